// The schema as JSON Schema (draft 2020-12): for other languages, and for editors that complete and
// check YAML.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "csrc/config/schema.h"
#include "csrc/config/text.h"

namespace xlstm::config {
namespace {

using Json = nlohmann::ordered_json;

Json json_integer(const Limits& limits) {
  Json json = {{"type", "integer"}};
  if (limits.int_low != std::numeric_limits<int64_t>::min()) json["minimum"] = limits.int_low;
  if (limits.int_high != std::numeric_limits<int64_t>::max()) json["maximum"] = limits.int_high;
  if (limits.or_zero) return {{"anyOf", {{{"const", 0}}, json}}};
  return json;
}

Json json_number(const Limits& limits) {
  Json json = {{"type", "number"}};
  const double infinity = std::numeric_limits<double>::infinity();
  if (limits.low > -infinity) json[limits.low_open ? "exclusiveMinimum" : "minimum"] = limits.low;
  if (limits.high < infinity) json[limits.high_open ? "exclusiveMaximum" : "maximum"] = limits.high;
  return json;
}

Json json_string(const Limits& limits) {
  Json json = {{"type", "string"}};
  if (limits.not_empty) json["minLength"] = 1;
  if (limits.choices.empty()) return json;
  const bool has_number =
      std::any_of(limits.choices.begin(), limits.choices.end(),
                  [](const std::string& choice) { return choice.ends_with("-N"); });
  if (!has_number) {
    json["enum"] = limits.choices;
    return json;
  }
  std::vector<std::string> patterns;
  for (const std::string& choice : limits.choices) {
    patterns.push_back(choice.ends_with("-N") ? choice.substr(0, choice.size() - 1) + "[0-9]+"
                                              : choice);
  }
  json["pattern"] = "^(" + join(patterns, "|") + ")$";
  return json;
}

struct JsonDescriber {
  const Limits& limits;
  Json with(Json type, const Json& value) const {
    type["default"] = value;
    return type;
  }
  Json list(Json items, const Json& value) const {
    return {{"type", "array"}, {"items", items}, {"default", value}};
  }
  Json operator()(const int64_t* value) const { return with(json_integer(limits), *value); }
  Json operator()(const double* value) const { return with(json_number(limits), *value); }
  Json operator()(const bool* value) const { return with({{"type", "boolean"}}, *value); }
  Json operator()(const std::string* value) const { return with(json_string(limits), *value); }
  Json operator()(const std::vector<int64_t>* value) const {
    return list(json_integer(limits), *value);
  }
  Json operator()(const std::vector<std::string>* value) const {
    return list(json_string(limits), *value);
  }
  Json operator()(const std::vector<DataSource>*) const {
    Json properties = {{"path", {{"type", "string"}, {"minLength", 1}}},
                       {"weight", json_number(limits)}};
    properties["weight"]["default"] = DataSource().weight;
    return list({{"type", "object"},
                 {"properties", properties},
                 {"required", {"path"}},
                 {"additionalProperties", false}},
                Json::array());
  }
};

// The object of a section inside the root's "properties".
Json& section_object(Json& root, const std::string& name) {
  Json* object = &root;
  std::string rest = name;
  while (!rest.empty()) {
    const size_t dot = rest.find('.');
    object = &(*object)["properties"][rest.substr(0, dot)];
    rest = dot == std::string::npos ? "" : rest.substr(dot + 1);
  }
  return *object;
}

}  // namespace

std::string config_schema_json() {
  Config defaults;
  Json root = {{"$schema", "https://json-schema.org/draft/2020-12/schema"},
               {"title", "libxlstm configuration"},
               {"type", "object"},
               {"additionalProperties", false}};
  const Json path = {{"type", "string"}, {"minLength", 1}};
  root["properties"]["base"] = {
      {"description", "configurations to start from, relative to this file; later wins"},
      {"anyOf", {path, {{"type", "array"}, {"items", path}}}}};
  for (const Section& section : sections()) {
    section_object(root, section.name) = {
        {"type", "object"}, {"description", section.doc}, {"additionalProperties", false}};
  }
  for (const Field& field : schema()) {
    Json json = std::visit(JsonDescriber{field.limits}, field.ref(defaults));
    json["description"] = field.doc;
    section_object(root, parent_of(field.name))["properties"][last_part(field.name)] = json;
  }
  return root.dump(2) + "\n";
}

}  // namespace xlstm::config
