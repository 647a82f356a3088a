#pragma once
// YAML text -> a plain tree with line numbers. Refuses what makes YAML ambiguous or unsafe:
// duplicate keys (which yaml-cpp accepts), tabs in indentation, tags, several documents, unbounded
// aliases and nesting, text that is not UTF-8.
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace xlstm::config {

struct YamlNode;
using YamlNodePtr = std::shared_ptr<const YamlNode>;

struct YamlEntry {
  std::string key;
  int line = 0;  ///< of the key, 1-based
  YamlNodePtr value;
};

struct YamlNode {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  int line = 0;                    ///< 1-based
  std::string text;                ///< of a scalar
  bool quoted = false;             ///< the scalar stood in quotes or in a block ("|", ">")
  std::vector<YamlNodePtr> items;  ///< of a list
  std::vector<YamlEntry> entries;  ///< of a map, in file order, keys unique
  size_t size = 1;                 ///< nodes of this tree with aliases expanded
};

/// What a text is called in messages: a file (with line numbers) or a command-line override
/// (without).
struct YamlOrigin {
  std::string name;
  bool has_lines = true;
  std::string at(int line) const { return has_lines ? name + ":" + std::to_string(line) : name; }
};

/// Throws Error(kConfig) "origin:line: key path: what; fix". Empty text gives a kNull node.
YamlNodePtr read_yaml(std::string_view text, const YamlOrigin& origin);

/// Throws Error(kConfig, "where: key: what"); an empty key is left out.
[[noreturn]] void config_error(const std::string& where, const std::string& key,
                               const std::string& what);

}  // namespace xlstm::config
