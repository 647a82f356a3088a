#pragma once
// YAML value -> setting, checked against the schema's type and range.
#include <string>

#include "csrc/config/schema.h"
#include "csrc/config/yaml_reader.h"

namespace xlstm::config {

/// Sets `field` of `config`. Throws Error(kConfig) with place, key, what came and what was
/// expected. `key_line` is where the key stands (a missing value has no line of its own).
void read_field(Config& config, const Field& field, const YamlNode& value, const YamlOrigin& origin,
                int key_line);

/// Throws Error(kConfig) for a key that no setting has, with the most likely meant one. `name` is
/// dotted.
[[noreturn]] void unknown_key(const std::string& name, const std::string& where);

}  // namespace xlstm::config
