// The table of settings itself, its help and JSON forms, and the configurations that are shipped.
#include <nlohmann/json.hpp>
#include <set>

#include "tests/config/support.h"
#include "tests/support/catch.h"

namespace xlstm::config {
namespace {

// A YAML text that sets one setting: "a: {b: {c: value}}".
std::string yaml_for(const std::string& name, const std::string& value) {
  std::string text = value;
  std::string rest = name;
  while (true) {
    const size_t dot = rest.rfind('.');
    const std::string key = rest.substr(dot == std::string::npos ? 0 : dot + 1);
    if (dot == std::string::npos) return key + ": " + text;
    text = "{" + key + ": " + text + "}";
    rest.resize(dot);
  }
}

// Values just outside the range, from the schema.
std::vector<std::string> out_of_range(const Field& field) {
  Config config;
  const FieldRef ref = field.ref(config);
  const Limits& limits = field.limits;
  std::vector<std::string> values;
  if (std::holds_alternative<int64_t*>(ref)) {
    if (limits.int_low > std::numeric_limits<int64_t>::min())
      values.push_back(std::to_string(limits.int_low - 1));
    if (limits.int_high < std::numeric_limits<int64_t>::max())
      values.push_back(std::to_string(limits.int_high + 1));
    if (limits.or_zero) values.erase(std::remove(values.begin(), values.end(), "0"), values.end());
    values.insert(values.end(), {"9223372036854775808", "x", "true", "[1]", "null"});
  } else if (std::holds_alternative<double*>(ref)) {
    values = {".nan", ".inf", "-.inf", "x", "false", "{a: 1}", "null"};
    if (limits.low > -1e300) values.push_back("-1e-9");
    if (limits.low_open) values.push_back("0");
    if (limits.high < 1e300) values.push_back("1001");
    if (limits.high_open) values.push_back("1");
  } else if (std::holds_alternative<bool*>(ref)) {
    values = {"yes", "no", "1", "0", "x", "null", "[]"};
  } else if (std::holds_alternative<std::string*>(ref)) {
    values = {"null", "[a]", "{a: b}"};
    if (!limits.choices.empty()) values.insert(values.end(), {"\"\"", "zzz", "1"});
    if (limits.not_empty) values.push_back("\"\"");
  } else {
    values = {"x", "1", "null", "{a: 1}", "[null]", "[[]]"};
  }
  return values;
}

}  // namespace

TEST_CASE("every setting refuses every value outside its range when it is read") {
  size_t refused = 0;
  for (const Field& field : schema()) {
    for (const std::string& value : out_of_range(field)) {
      const std::string yaml = yaml_for(field.name, value);
      INFO(yaml);
      const std::string message = parse_message(yaml);
      CHECK(message.starts_with("f.yaml:1: " + field.name));
      CHECK(message.find(", expected ") != std::string::npos);
      ++refused;
    }
  }
  CHECK(refused > 4 * schema().size());
}

TEST_CASE("names are unique, in known sections, with one line of description") {
  std::set<std::string> names;
  for (const Field& field : schema()) {
    INFO(field.name);
    CHECK(names.insert(field.name).second);
    CHECK(find_section(parent_of(field.name)) != nullptr);
    CHECK(!field.doc.empty());
    CHECK(field.doc.find('\n') == std::string::npos);
  }
  Config a;
  std::set<void*> places;
  for (const Field& field : schema()) {
    CHECK(places
              .insert(
                  std::visit([](auto* target) { return static_cast<void*>(target); }, field.ref(a)))
              .second);
  }
}

TEST_CASE("defaults lie within their own ranges") {
  const Config loaded = parse_config(print_config(Config()), "f");
  CHECK(differences(loaded, Config()).empty());
}

TEST_CASE("help mentions every setting with type, default and description, and every section") {
  const std::string help = config_help();
  Config defaults;
  for (const Field& field : schema()) {
    const size_t place = help.find("\n  " + field.name + " ");
    REQUIRE(place != std::string::npos);
    const std::string line = help.substr(place + 1, help.find('\n', place + 1) - place - 1);
    INFO(line);
    CHECK(line.find(describe_type(field)) != std::string::npos);
    CHECK(line.find("  " + format_value(field.ref(defaults)) + " ") != std::string::npos);
    CHECK(line.ends_with(field.doc));
  }
  for (const Section& section : sections()) {
    CHECK(help.find("\n" + section.name + " - " + section.doc + "\n") != std::string::npos);
  }
}

TEST_CASE("the JSON schema is valid JSON with every setting") {
  const auto root = nlohmann::json::parse(config_schema_json());
  for (const Field& field : schema()) {
    const nlohmann::json* node = &root;
    std::string rest = field.name;
    while (!rest.empty()) {
      const size_t dot = rest.find('.');
      node = &node->at("properties").at(rest.substr(0, dot));
      rest = dot == std::string::npos ? "" : rest.substr(dot + 1);
    }
    INFO(field.name);
    CHECK(node->at("description") == field.doc);
    CHECK(node->contains("default"));
  }
}

TEST_CASE("all shipped configurations load, those of runs are complete") {
  const std::filesystem::path root = std::filesystem::path(XLSTM_SOURCE_DIR) / "configs";
  size_t loaded = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
    if (entry.path().extension() != ".yaml") continue;
    const std::string folder = entry.path().parent_path().filename().string();
    if (folder == "data") continue;
    INFO(entry.path().string());
    const std::string path = entry.path().string();
    const std::string name = entry.path().stem().string();
    const std::string message = message_of([&] {
      // shakespeare.yaml takes its text on the command line; *_base.yaml files are parts of others.
      const std::vector<std::string> overrides =
          name == "shakespeare" ? std::vector<std::string>{"data.text=input.txt"}
                                : std::vector<std::string>();
      const Config config = load_config(path, overrides);
      if (folder == "runs" && !name.ends_with("_base")) validate_for_training(config);
      warn_of_settings_without_effect(config, [](const std::string& text) { FAIL_CHECK(text); });
    });
    CHECK(message == "");
    ++loaded;
  }
  CHECK(loaded >= 20);
}

TEST_CASE("every run and model has its paper's sizes") {
  const std::filesystem::path root = std::filesystem::path(XLSTM_SOURCE_DIR) / "configs";
  // Table 7 of arXiv 2405.04517: width, blocks, peak learning rate of the 15B-token comparison.
  struct Row {
    std::string size;
    int64_t dim, blocks;
    double rate;
  };
  const std::vector<Row> rows = {{"125m", 768, 24, 3e-3},
                                 {"350m", 1024, 48, 1e-3},
                                 {"760m", 1536, 48, 9e-4},
                                 {"1.3b", 2048, 48, 9e-4},
                                 {"2.7b", 2560, 64, 8e-4}};
  for (const Row& row : rows) {
    for (const std::string ratio : {"1-0", "7-1"}) {
      const Config config = load_config(
          (root / "runs" / ("slimpajama15b_" + row.size + "_" + ratio + ".yaml")).string());
      INFO(row.size + " " + ratio);
      CHECK(config.model.kind == "xlstm");
      CHECK(config.model.vocab_size == 50304);
      CHECK(config.model.embedding_dim == row.dim);
      CHECK(config.model.num_blocks == row.blocks);
      CHECK(config.model.num_heads == 4);
      CHECK(config.model.slstm_at.empty() == (ratio == "1-0"));
      CHECK(config.optim.learning_rate == row.rate);
      CHECK(config.optim.min_lr == Approx(0.1 * row.rate));
      CHECK(config.train.global_batch_size == 256);
      CHECK(config.data.seq_len == 2048);
      CHECK(config.train.max_steps == 30000);
    }
  }
}

}  // namespace xlstm::config
