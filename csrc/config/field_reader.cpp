#include "csrc/config/field_reader.h"

#include <algorithm>

#include "csrc/config/text.h"

namespace xlstm::config {
namespace {

std::string lower_case(std::string text) {
  for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return text;
}

bool is_one_of(const std::string& word, const std::vector<std::string>& words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

std::string describe_value(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kNull:
      return "no value";
    case YamlNode::Kind::kList:
      return "a list";
    case YamlNode::Kind::kMap:
      return "a map of keys";
    default:
      return (node.quoted ? "the text " : "") + in_quotes(node.text);
  }
}

// A value with everything a message about it needs.
struct Value {
  const YamlNode& node;
  const Field& field;
  std::string key;
  std::string where;
  std::string expected;  // type and range in words

  [[noreturn]] void fail(const std::string& fix = "") const {
    config_error(
        where, key,
        "got " + describe_value(node) + ", expected " + expected + (fix.empty() ? "" : "; " + fix));
  }

  const std::string& scalar() const {
    if (node.kind == YamlNode::Kind::kNull) fail("give a value or remove the line");
    if (node.kind != YamlNode::Kind::kScalar) fail();
    return node.text;
  }
  // Text of a number or a boolean, which stand without quotes.
  const std::string& plain_scalar() const {
    const std::string& text = scalar();
    if (node.quoted) fail("remove the quotes");
    return text;
  }
};

std::string without(std::string text, char removed) {
  text.erase(std::remove(text.begin(), text.end(), removed), text.end());
  return text;
}

// Why a text that looks like a number is none, as advice.
std::string number_advice(const std::string& text, bool integer) {
  const std::string low = lower_case(text);
  const bool negative = !low.empty() && low[0] == '-';
  const std::string body = !low.empty() && (low[0] == '-' || low[0] == '+') ? low.substr(1) : low;
  if (is_one_of(body, {".inf", "inf", "infinity", ".nan", "nan"}))
    return "only finite numbers are allowed";
  if (parse_double(without(body, '_'))) {
    if (body.find('_') != std::string::npos)
      return "write " + without(text, '_') + ", without underscores";
    const double value = *parse_double(body);
    if (integer && value == static_cast<double>(static_cast<int64_t>(std::min(value, 9e18))) &&
        value < 9e15) {
      return "write " + std::string(negative ? "-" : "") +
             std::to_string(static_cast<int64_t>(value));
    }
    return integer && body.find_first_not_of("0123456789") == std::string::npos
               ? "it does not fit 64 bits"
               : "";
  }
  if (body.find_first_not_of("0123456789") == std::string::npos && body.size() > 1 &&
      body[0] == '0') {
    return "leading zeros are not allowed";
  }
  if (body.starts_with("0x") || body.starts_with("0o") || body.starts_with("0b"))
    return "write a decimal number";
  if (body.find(',') != std::string::npos) return "write a point, and no thousands separators";
  if (body.find_first_not_of("0123456789.e+-") == std::string::npos && !body.empty()) {
    return "the number is malformed or out of double's range";
  }
  return "";
}

int64_t read_int(const Value& value) {
  const std::string& text = value.plain_scalar();
  const auto number = parse_int(text);
  if (!number) value.fail(number_advice(text, true));
  const Limits& limits = value.field.limits;
  const bool zero = limits.or_zero && *number == 0;
  if (!zero && (*number < limits.int_low || *number > limits.int_high)) value.fail();
  return *number;
}

double read_double(const Value& value) {
  const std::string& text = value.plain_scalar();
  const auto number = parse_double(text);
  const Limits& limits = value.field.limits;
  if (!number) value.fail(number_advice(text, false));
  const bool too_low = limits.low_open ? *number <= limits.low : *number < limits.low;
  const bool too_high = limits.high_open ? *number >= limits.high : *number > limits.high;
  if (too_low || too_high) value.fail();
  return *number;
}

bool read_bool(const Value& value) {
  const std::string& text = value.plain_scalar();
  if (text == "true" || text == "false") return text == "true";
  const std::string low = lower_case(text);
  if (is_one_of(low, {"true", "yes", "on", "y", "1"})) value.fail("write true");
  if (is_one_of(low, {"false", "no", "off", "n", "0"})) value.fail("write false");
  value.fail();
}

bool is_choice(const std::string& text, const std::string& choice) {
  if (!choice.ends_with("-N")) return text == choice;
  const std::string prefix = choice.substr(0, choice.size() - 1);
  return text.starts_with(prefix) && text.size() > prefix.size() &&
         text.find_first_not_of("0123456789", prefix.size()) == std::string::npos;
}

std::string read_string(const Value& value) {
  if (value.node.kind == YamlNode::Kind::kNull) {
    value.fail("write \"\" for empty text, or remove the line");
  }
  const std::string& text = value.scalar();
  const Limits& limits = value.field.limits;
  if (text.find('\0') != std::string::npos) value.fail("remove the NUL character");
  if (limits.not_empty && text.empty()) value.fail();
  if (limits.choices.empty()) return text;
  for (const std::string& choice : limits.choices) {
    if (is_choice(text, choice)) return text;
  }
  const std::string meant = closest_match(text, limits.choices);
  value.fail(meant.empty() ? "" : "did you mean " + meant + "?");
}

const std::vector<YamlNodePtr>& items_of(const Value& value) {
  if (value.node.kind == YamlNode::Kind::kList) return value.node.items;
  static Config defaults;
  const bool sources = std::holds_alternative<std::vector<DataSource>*>(value.field.ref(defaults));
  value.fail(sources ? "write [{path: PREFIX}]" : "write [value, value], or [] for none");
}

DataSource read_source(const Value& value) {
  DataSource source;
  if (value.node.kind != YamlNode::Kind::kMap) {
    value.fail("write {path: PREFIX} or {path: PREFIX, weight: NUMBER}");
  }
  for (const YamlEntry& entry : value.node.entries) {
    const bool is_path = entry.key == "path";
    const Value item{*entry.value, value.field, value.key + "." + entry.key, value.where,
                     is_path ? "text, not empty" : "number > 0"};
    if (is_path) {
      source.path = read_string(item);
      if (source.path.empty()) item.fail();
    } else if (entry.key == "weight") {
      source.weight = read_double(item);
    } else {
      const std::string meant = closest_match(entry.key, {"path", "weight"});
      config_error(value.where, item.key,
                   "unknown key; " + (meant.empty() ? "expected path and weight"
                                                    : "did you mean " + meant + "?"));
    }
  }
  if (source.path.empty())
    config_error(value.where, value.key, "path is missing; write {path: PREFIX, weight: NUMBER}");
  return source;
}

// Replaces the setting: a list in a later file takes the place of the earlier one.
struct Setter {
  const Value& value;
  const YamlOrigin& origin;

  template <typename T, typename Read>
  void list(std::vector<T>* target, Read read) const {
    std::vector<T> out;
    for (const YamlNodePtr& item : items_of(value)) {
      const std::string key = value.key + "[" + std::to_string(out.size()) + "]";
      const std::string type = value.expected.substr(std::string("list of ").size());
      out.push_back(read(Value{*item, value.field, key, origin.at(item->line), type}));
    }
    *target = std::move(out);
  }
  void operator()(int64_t* target) const { *target = read_int(value); }
  void operator()(double* target) const { *target = read_double(value); }
  void operator()(bool* target) const { *target = read_bool(value); }
  void operator()(std::string* target) const { *target = read_string(value); }
  void operator()(std::vector<int64_t>* target) const { list(target, read_int); }
  void operator()(std::vector<std::string>* target) const { list(target, read_string); }
  void operator()(std::vector<DataSource>* target) const { list(target, read_source); }
};

// Names of settings and sections directly below a section ("" is the root).
std::vector<std::string> children_of(const std::string& section) {
  std::vector<std::string> names;
  for (const Field& field : schema()) {
    if (parent_of(field.name) == section) names.push_back(last_part(field.name));
  }
  for (const Section& child : sections()) {
    if (parent_of(child.name) == section) names.push_back(last_part(child.name));
  }
  if (section.empty()) names.push_back("base");
  return names;
}

// Settings anywhere whose own name passes a test, as "a or b"; "" when there are none or too many
// to help.
template <typename Test>
std::string fields_where(Test test) {
  std::vector<std::string> names;
  for (const Field& field : schema()) {
    if (test(last_part(field.name))) names.push_back(field.name);
  }
  return names.size() <= 4 ? join(names, " or ") : "";
}

// What other trainers call a setting, where the names have nothing in common.
std::string known_elsewhere_as(const std::string& key) {
  static const std::vector<std::pair<std::string, std::string>> kNames = {
      {"lr", "optim.learning_rate"},
      {"wd", "optim.weight_decay"},
      {"betas", "optim.beta1 and beta2"},
      {"hidden_size", "model.embedding_dim"},
      {"hidden_dim", "model.embedding_dim"},
      {"d_model", "model.embedding_dim"},
      {"dim", "model.embedding_dim"},
      {"num_layers", "model.num_blocks"},
      {"n_layer", "model.num_blocks"},
      {"n_head", "model.num_heads"},
      {"context_length", "data.seq_len"},
      {"block_size", "data.seq_len"},
      {"gradient_accumulation_steps", "train.global_batch_size / train.micro_batch_size"},
      {"clip_grad", "train.grad_clip"},
      {"threads", "run.num_threads"}};
  for (const auto& [other, ours] : kNames) {
    if (other == key) return ours;
  }
  return "";
}

std::string suggestion(const std::string& name) {
  const std::string section = parent_of(name), key = last_part(name);
  const auto did_you_mean = [](const std::string& what) { return "did you mean " + what + "?"; };
  const std::string alias = known_elsewhere_as(key);
  if (!alias.empty()) return did_you_mean(alias);
  const std::string same = fields_where([&](const std::string& other) { return other == key; });
  if (!same.empty()) return did_you_mean(same);
  if (find_section(key) != nullptr) return did_you_mean("the section " + key);
  const std::string sibling = closest_match(key, children_of(section));
  if (!sibling.empty()) return did_you_mean(section.empty() ? sibling : section + "." + sibling);
  std::vector<std::string> all;
  for (const Field& field : schema()) all.push_back(last_part(field.name));
  const std::string close = closest_match(key, all);
  if (!close.empty())
    return did_you_mean(fields_where([&](const std::string& other) { return other == close; }));
  if (key.size() >= 4) {
    const std::string holding =
        fields_where([&](const std::string& other) { return other.find(key) != other.npos; });
    if (!holding.empty()) return did_you_mean(holding);
  }
  const std::string known =
      join(children_of(find_section(section) != nullptr ? section : ""), ", ");
  return (section.empty() ? "sections are " : "known are ") + known;
}

}  // namespace

void read_field(Config& config, const Field& field, const YamlNode& value, const YamlOrigin& origin,
                int key_line) {
  const int line = value.kind == YamlNode::Kind::kScalar ? value.line : key_line;
  const Value checked{value, field, field.name, origin.at(line), describe_type(field)};
  std::visit(Setter{checked, origin}, field.ref(config));
  config.origin[field.name] = origin.at(line);
}

void unknown_key(const std::string& name, const std::string& where) {
  config_error(where, name, "unknown key; " + suggestion(name));
}

}  // namespace xlstm::config
