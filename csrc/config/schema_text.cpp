// The schema as text: types in words, values as YAML, --help, a full configuration.
#include <algorithm>

#include "csrc/config/schema.h"
#include "csrc/config/text.h"

namespace xlstm::config {
namespace {

constexpr int64_t kMinInt = std::numeric_limits<int64_t>::min();
constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();

// A number without a fraction is shorter without ".0" in words.
std::string short_number(double value) {
  std::string text = format_double(value);
  return text.ends_with(".0") ? text.substr(0, text.size() - 2) : text;
}

std::string describe_integer(const Limits& limits) {
  const std::string zero = limits.or_zero ? "0 or " : "";
  if (limits.int_low == kMinInt) return "integer";
  if (limits.int_high == kMaxInt) return "integer " + zero + ">= " + std::to_string(limits.int_low);
  return "integer " + zero + std::to_string(limits.int_low) + ".." +
         std::to_string(limits.int_high);
}

std::string describe_number(const Limits& limits) {
  const bool has_low = limits.low > -std::numeric_limits<double>::infinity();
  const bool has_high = limits.high < std::numeric_limits<double>::infinity();
  std::string text = "number";
  if (has_low) text += (limits.low_open ? " > " : " >= ") + short_number(limits.low);
  if (has_low && has_high) text += " and";
  if (has_high) text += (limits.high_open ? " < " : " <= ") + short_number(limits.high);
  return text;
}

std::string describe_string(const Limits& limits) {
  if (!limits.choices.empty()) return join(limits.choices, " | ");
  return limits.not_empty ? "text, not empty" : "text";
}

// Words that some YAML reader takes for something other than text.
bool is_reserved_word(std::string text) {
  for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  static const std::vector<std::string> kWords = {"null", "true", "false", "yes", "no",
                                                  "on",   "off",  "y",     "n"};
  return std::find(kWords.begin(), kWords.end(), text) != kWords.end();
}

std::string format_string(const std::string& text) {
  const auto is_letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '/';
  };
  const auto is_plain = [&](char c) {
    return is_letter(c) || (c >= '0' && c <= '9') || c == '.' || c == '-';
  };
  const bool plain =
      !text.empty() && is_letter(text[0]) && std::all_of(text.begin(), text.end(), is_plain);
  return plain && !is_reserved_word(text) ? text : double_quoted(text);
}

std::string format_source(const DataSource& source) {
  return "{path: " + format_string(source.path) + ", weight: " + format_double(source.weight) + "}";
}

template <typename T, typename Format>
std::string format_list(const std::vector<T>& items, Format format) {
  std::vector<std::string> parts;
  for (const T& item : items) parts.push_back(format(item));
  return "[" + join(parts, ", ") + "]";
}

struct ValueFormatter {
  std::string operator()(const int64_t* value) const { return std::to_string(*value); }
  std::string operator()(const double* value) const { return format_double(*value); }
  std::string operator()(const bool* value) const { return *value ? "true" : "false"; }
  std::string operator()(const std::string* value) const { return format_string(*value); }
  std::string operator()(const std::vector<int64_t>* value) const {
    return format_list(*value, [](int64_t item) { return std::to_string(item); });
  }
  std::string operator()(const std::vector<std::string>* value) const {
    return format_list(*value, format_string);
  }
  std::string operator()(const std::vector<DataSource>* value) const {
    return format_list(*value, format_source);
  }
};

struct TypeDescriber {
  const Limits& limits;
  std::string operator()(const int64_t*) const { return describe_integer(limits); }
  std::string operator()(const double*) const { return describe_number(limits); }
  std::string operator()(const bool*) const { return "true | false"; }
  std::string operator()(const std::string*) const { return describe_string(limits); }
  std::string operator()(const std::vector<int64_t>*) const {
    return "list of " + describe_integer(limits);
  }
  std::string operator()(const std::vector<std::string>*) const {
    return "list of " + describe_string(limits);
  }
  std::string operator()(const std::vector<DataSource>*) const { return "list of {path, weight}"; }
};

std::string padded(std::string text, size_t width) {
  if (text.size() < width) text.resize(width, ' ');
  return text;
}

std::vector<const Field*> fields_of(const Section& section) {
  std::vector<const Field*> fields;
  for (const Field& field : schema()) {
    if (parent_of(field.name) == section.name) fields.push_back(&field);
  }
  return fields;
}

std::string print_section(const Section& section, Config& config) {
  const auto depth = static_cast<size_t>(std::count(section.name.begin(), section.name.end(), '.'));
  const std::string indent(2 * depth, ' ');
  std::string out = indent + last_part(section.name) + ":  # " + section.doc + "\n";
  for (const Field* field : fields_of(section)) {
    const FieldRef value = field->ref(config);
    std::string line = indent + "  " + last_part(field->name) + ": ";
    const auto* sources = std::get_if<std::vector<DataSource>*>(&value);
    const bool as_block = sources != nullptr && !(*sources)->empty();
    if (!as_block) line += format_value(value);
    out += padded(line, 40) + "  # " + field->doc + " [" + describe_type(*field) + "]\n";
    if (as_block) {
      for (const DataSource& source : **sources)
        out += indent + "    - " + format_source(source) + "\n";
    }
  }
  return out;
}

}  // namespace

std::string describe_type(const Field& field) {
  static Config defaults;
  return std::visit(TypeDescriber{field.limits}, field.ref(defaults));
}

std::string format_value(const FieldRef& value) { return std::visit(ValueFormatter(), value); }

std::string print_config(const Config& config) {
  Config copy = config;
  std::string out;
  for (const Section& section : sections()) out += print_section(section, copy);
  return out;
}

std::string config_help() {
  Config defaults;
  size_t name_width = 0, type_width = 0, default_width = 0;
  for (const Field& field : schema()) {
    name_width = std::max(name_width, field.name.size());
    type_width = std::max(type_width, std::min<size_t>(describe_type(field).size(), 28));
    default_width =
        std::max(default_width, std::min<size_t>(format_value(field.ref(defaults)).size(), 10));
  }
  std::string out =
      "Settings: in a YAML file as `section: {key: value}`, on the command line as "
      "section.key=value.\n"
      "Columns: name, type and range, default, meaning.\n";
  for (const Section& section : sections()) {
    out += "\n" + section.name + " - " + section.doc + "\n";
    for (const Field* field : fields_of(section)) {
      out += "  " + padded(field->name, name_width) + "  " +
             padded(describe_type(*field), type_width) + "  " +
             padded(format_value(field->ref(defaults)), default_width) + "  " + field->doc + "\n";
    }
  }
  out +=
      "\nA file may start from others: `base: path` or `base: [path, path]`, relative to the file; "
      "later wins.\n";
  return out;
}

}  // namespace xlstm::config
