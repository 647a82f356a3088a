#include "csrc/config/config.h"

#include <algorithm>
#include <filesystem>

#include "csrc/config/field_reader.h"
#include "csrc/config/schema.h"
#include "csrc/config/text.h"
#include "csrc/config/validate.h"
#include "csrc/config/yaml_reader.h"
#include "csrc/core/file.h"
#include "csrc/core/utf8.h"

namespace xlstm::config {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxFiles = 100;  // a diamond of bases is fine, a lattice of them is not

// "; did you mean ...?" when the folder holds a YAML file of a similar name.
std::string similar_file(const fs::path& path) {
  std::error_code ignored;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  std::vector<std::string> names;
  for (fs::directory_iterator it(folder, ignored), end; !ignored && it != end;
       it.increment(ignored)) {
    if (it->path().extension() == ".yaml") names.push_back(it->path().filename().string());
  }
  const std::string meant = closest_match(path.filename().string(), names);
  return meant.empty() ? "" : "; did you mean " + (path.parent_path() / meant).string() + "?";
}

std::string read_text(const fs::path& path, const std::string& where) {
  std::error_code ignored;
  const fs::file_status status = fs::status(path, ignored);
  const std::string name = "'" + path.string() + "'";  // never cut: the end tells files apart
  if (!fs::exists(status)) config_error(where, "", "no such file " + name + similar_file(path));
  constexpr size_t kEnough = (size_t{1} << 20) + 1;  // the reader refuses more
  try {
    return read_file(path.string(), ExitCode::kConfig, kEnough);
  } catch (const Error& error) {
    config_error(where, "", error.what());
  }
}

// Applies files and overrides to one Config, later over earlier.
class Loader {
 public:
  void load_file(const fs::path& path, const std::string& where) {
    std::error_code ignored;
    fs::path canonical = fs::weakly_canonical(path, ignored);
    if (ignored) canonical = path;
    if (std::find(open_files_.begin(), open_files_.end(), canonical) != open_files_.end()) {
      config_error(where, "",
                   in_quotes(path.string()) + " is based on itself; remove one of the bases");
    }
    if (++num_files_ > kMaxFiles) {
      config_error(where, "",
                   "more than " + std::to_string(kMaxFiles) + " files in all; use fewer bases");
    }
    const std::string text = read_text(path, where);
    open_files_.push_back(canonical);
    load_text(text, path.string());
    open_files_.pop_back();
  }

  void load_text(const std::string& text, const std::string& name) {
    const YamlOrigin origin{name};
    const YamlNodePtr root = read_yaml(text, origin);
    if (root->kind == YamlNode::Kind::kNull) {
      config_error(name, "", "the file is empty, expected settings such as `run: {name: first}`");
    }
    if (root->kind != YamlNode::Kind::kMap) {
      config_error(
          origin.at(root->line), "",
          "expected sections such as `run: {name: first}`; is the space behind a colon missing?");
    }
    for (const YamlEntry& entry : root->entries) {
      if (entry.key == "base") load_bases(entry, origin);
    }
    for (const YamlEntry& entry : root->entries) {
      if (entry.key != "base") apply(entry, "", origin);
    }
  }

  void apply_override(const std::string& text) {
    const YamlOrigin origin{"override " + in_quotes(text), false};
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      config_error(origin.name, "", "expected key.sub=value, such as train.max_steps=100");
    }
    const std::string name = text.substr(0, equals), value = text.substr(equals + 1);
    if (name == "base")
      config_error(origin.name, "base", "works inside files only; load the other file instead");
    if (find_section(name) != nullptr) {
      config_error(origin.name, name,
                   "is a section; override one setting of it, as in " + name + ".key=value");
    }
    const Field* field = find_field(name);
    if (field == nullptr) unknown_key(name, origin.name);
    read_field(config_, *field, *override_value(*field, value, origin), origin, 1);
  }

  Config take() { return std::move(config_); }

 private:
  // Paths and prompts hold characters that mean something in YAML ("*.txt", "#1"): text stands for
  // itself.
  YamlNodePtr override_value(const Field& field, const std::string& value,
                             const YamlOrigin& origin) {
    const bool is_text = std::holds_alternative<std::string*>(field.ref(config_));
    const bool is_quoted = !value.empty() && (value[0] == '"' || value[0] == '\'');
    if (!is_text || is_quoted) return read_yaml(value, origin);
    if (find_invalid_utf8(value) != value.size())
      config_error(origin.name, field.name, "not UTF-8 text");
    auto node = std::make_shared<YamlNode>();
    node->kind = YamlNode::Kind::kScalar;
    node->text = value;
    return node;
  }

  void load_bases(const YamlEntry& entry, const YamlOrigin& origin) {
    const bool list = entry.value->kind == YamlNode::Kind::kList;
    const std::vector<YamlNodePtr> items =
        list ? entry.value->items : std::vector<YamlNodePtr>{entry.value};
    for (const YamlNodePtr& item : items) {
      if (item->kind != YamlNode::Kind::kScalar || item->text.empty()) {
        config_error(origin.at(entry.line), "base",
                     "expected a path or a list of paths, relative to this file");
      }
      load_file(fs::path(origin.name).parent_path() / item->text, origin.at(item->line) + ": base");
    }
  }

  void apply(const YamlEntry& entry, const std::string& section, const YamlOrigin& origin) {
    const std::string name = section.empty() ? entry.key : section + "." + entry.key;
    const std::string where = origin.at(entry.line);
    if (const Field* field = find_field(name); field != nullptr) {
      if (section.empty() || entry.key.find('.') != std::string::npos) {
        config_error(where, name,
                     "dots work on the command line only; write `" + parent_of(name) + ": {" +
                         last_part(name) + ": ...}`");
      }
      read_field(config_, *field, *entry.value, origin, entry.line);
      return;
    }
    if (find_section(name) == nullptr) unknown_key(name, where);
    if (entry.value->kind == YamlNode::Kind::kNull) {
      config_error(where, name, "the section is empty, expected keys below it; remove the line");
    }
    if (entry.value->kind != YamlNode::Kind::kMap) {
      config_error(where, name, "is a section, expected keys below it, got a value");
    }
    for (const YamlEntry& child : entry.value->entries) apply(child, name, origin);
  }

  Config config_;
  std::vector<fs::path> open_files_;
  int num_files_ = 0;
};

}  // namespace

int64_t total_steps(const Config& config) {
  if (config.train.max_steps > 0) return config.train.max_steps;
  const int64_t tokens = config.train.max_tokens, per_step = tokens_per_step(config);
  return tokens / per_step + (tokens % per_step != 0);
}

int64_t tokens_per_step(const Config& config) {
  return config.train.global_batch_size * config.data.seq_len;
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
  Loader loader;
  loader.load_file(path, "configuration");
  for (const std::string& text : overrides) loader.apply_override(text);
  Config config = loader.take();
  validate_model(config);
  validate_tokens(config);
  return config;
}

Config parse_config(const std::string& yaml, const std::string& name) {
  Loader loader;
  loader.load_text(yaml, name);
  Config config = loader.take();
  validate_model(config);
  validate_tokens(config);
  return config;
}

}  // namespace xlstm::config
