#pragma once
// One table of every setting: it drives parsing, --help, print_config and the JSON schema.
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "csrc/config/config.h"

namespace xlstm::config {

/// Where a setting lives in a Config; the alternative is its type.
using FieldRef = std::variant<int64_t*, double*, bool*, std::string*, std::vector<int64_t>*,
                              std::vector<std::string>*, std::vector<DataSource>*>;

/// What a value may be; for lists, each item.
struct Limits {
  int64_t int_low = std::numeric_limits<int64_t>::min();
  int64_t int_high = std::numeric_limits<int64_t>::max();
  bool or_zero = false;  ///< integers: 0 is allowed below int_low
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;  ///< the bound itself is not allowed
  bool not_empty = false;                    ///< text
  std::vector<std::string> choices;          ///< text; "step-N" stands for step- and a number
};

/// When a setting has an effect.
struct Condition {
  bool (*holds)(const Config&) = nullptr;  ///< null: always
  std::string_view otherwise;              ///< why it has none
};

struct Field {
  std::string name;  ///< dotted, as the path of the member in Config
  FieldRef (*ref)(Config&);
  Limits limits;
  std::string doc;  ///< one line
  /// A run that goes on must have the value that it began with.
  bool identity = false;
  /// Processes of one run may have different values: where a machine has its files, how many threads it has.
  bool per_machine = false;
  Condition has_effect = {};  ///< else it is taken all the same, with a warning
};

struct Section {
  std::string name;  ///< dotted: "model", "model.mlstm"
  std::string doc;
};

/// All settings, grouped by section, in the order in which they are printed.
const std::vector<Field>& schema();
const std::vector<Section>& sections();
const Field* find_field(const std::string& name);
const Section* find_section(const std::string& name);

/// "model.mlstm" of "model.mlstm.normalize"; "" for a name without a dot.
std::string parent_of(const std::string& name);
std::string last_part(const std::string& name);

/// "integer >= 1", "cosine | linear", "list of text": what messages and --help call a field's type
/// and range.
std::string describe_type(const Field& field);
/// The value as YAML on one line (data.train in flow form).
std::string format_value(const FieldRef& value);

}  // namespace xlstm::config
