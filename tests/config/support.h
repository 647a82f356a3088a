#pragma once
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <type_traits>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/config/schema.h"
#include "csrc/core/error.h"

namespace xlstm::config {

/// A folder that is gone at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "xlstm-config-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  /// Writes a file (and the folders above it) and returns its path.
  std::string write(const std::string& name, const std::string& text) const {
    const std::filesystem::path path = path_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }
  std::string path(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

/// The message of the configuration error that `action` throws; "" when it throws none.
template <typename Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code == ExitCode::kConfig ? error.what() : std::string("wrong exit code");
  }
  return "";
}

/// The message of parsing a text named f.yaml.
inline std::string parse_message(const std::string& yaml) {
  return message_of([&] { parse_config(yaml, "f.yaml"); });
}

struct SameValue {
  bool operator()(const std::vector<DataSource>* x, const std::vector<DataSource>* y) const {
    const auto same = [](const DataSource& s, const DataSource& t) {
      return s.path == t.path && s.weight == t.weight;
    };
    return std::equal(x->begin(), x->end(), y->begin(), y->end(), same);
  }
  template <typename T, typename U>
  bool operator()(const T* x, const U* y) const {
    if constexpr (std::is_same_v<T, U>) return *x == *y;
    return false;
  }
};

/// Names of the settings that differ.
inline std::vector<std::string> differences(Config a, Config b) {
  std::vector<std::string> names;
  for (const Field& field : schema()) {
    if (!std::visit(SameValue(), field.ref(a), field.ref(b))) names.push_back(field.name);
  }
  return names;
}

}  // namespace xlstm::config
