#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "csrc/core/file.h"
#include "train/log.h"
#include "train/metrics.h"

namespace xlstm::train {
namespace {

std::string json_number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  std::snprintf(text, sizeof text, "%.10g", value);
  return text;
}

std::string json_string(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

/// `"step":S,"time":T` with T in seconds since 1970.
std::string stamp(int64_t step) {
  const double time =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  char text[80];
  std::snprintf(text, sizeof text, "\"step\":%lld,\"time\":%.3f", static_cast<long long>(step),
                time);
  return text;
}

}  // namespace

JsonlWriter::JsonlWriter(std::string path)
    : path_(std::move(path)),
      fd_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644)) {
  if (fd_ < 0) {
    failed_ = true;
    log_warning(path_ + ": cannot open: " + std::strerror(errno) + "; nothing is written there");
  }
}

JsonlWriter::~JsonlWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void JsonlWriter::write_line(std::string json) {
  if (fd_ < 0) return;
  json += '\n';
  struct stat before {};
  const bool known = ::fstat(fd_, &before) == 0;
  const ssize_t written = ::write(fd_, json.data(), json.size());
  if (written == static_cast<ssize_t>(json.size())) {
    failed_ = false;
    return;
  }
  const int error = written < 0 ? errno : ENOSPC;
  if (written > 0 && known && ::ftruncate(fd_, before.st_size) != 0) {
    log_debug(path_ + ": a torn line could not be taken back");
  }
  if (!failed_)
    log_warning(path_ + ": " + std::strerror(error) + "; this line is lost, training goes on");
  failed_ = true;
}

void JsonlWriter::write_metrics(int64_t step, const Metrics& metrics,
                                const std::string& held_out_set) {
  std::string line = "{" + stamp(step);
  for (const auto& [key, value] : metrics) {
    line += ",\"" + key + "\":" + json_number(value);
    if (key.ends_with("/loss")) {
      char text[40];
      std::snprintf(text, sizeof text, "%a", value);
      line += ",\"" + key + "_hex\":\"" + text + "\"";
    }
  }
  if (!held_out_set.empty())
    line += "," + json_string(kHeldOutSet) + ":" + json_string(held_out_set);
  write_line(line + "}");
}

void JsonlWriter::write_event(const std::string& event, int64_t step,
                              const std::vector<std::pair<std::string, std::string>>& fields) {
  std::string line = "{\"event\":" + json_string(event) + "," + stamp(step);
  for (const auto& [key, value] : fields) line += "," + json_string(key) + ":" + json_string(value);
  write_line(line + "}");
}

int64_t truncate_jsonl(const std::string& path, int64_t step) {
  if (!std::filesystem::exists(path)) return 0;
  const std::string text = read_file(path);
  std::string kept, dropped;
  int64_t count = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const bool whole = end != std::string::npos;
    std::string line = text.substr(begin, whole ? end - begin : std::string::npos);
    begin = whole ? end + 1 : text.size();
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool keep = whole && json.is_object() && json.contains("step") &&
                      json["step"].is_number_integer() && json["step"].get<int64_t>() <= step;
    if (!keep) ++count;
    (keep ? kept : dropped) += line + "\n";
  }
  if (count == 0) return 0;
  // First the copy, then the cut: a crash in between repeats lines in the copy and loses none.
  OutputFile backup(path + ".bak.tmp");
  if (std::filesystem::exists(path + ".bak")) backup.write(read_file(path + ".bak"));
  backup.write(dropped);
  backup.sync_and_close();
  std::filesystem::rename(path + ".bak.tmp", path + ".bak");
  write_file_atomically(path, kept);
  return count;
}

std::vector<nlohmann::json> lines_of_step(const std::string& path, int64_t step) {
  std::vector<nlohmann::json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_object() && json.value("step", nlohmann::json()) == step)
      lines.push_back(std::move(json));
  }
  return lines;
}

double last_value(const std::string& path, const std::string& key) {
  double value = std::numeric_limits<double>::quiet_NaN();
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_object() && json.contains(key) && json[key].is_number())
      value = json[key].get<double>();
  }
  return value;
}

}  // namespace xlstm::train
