#include "csrc/core/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace xlstm {

std::string format_duration(double seconds) {
  char text[32];
  const auto total = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  if (total >= 3600) {
    std::snprintf(text, sizeof text, "%lldh%02lldm", static_cast<long long>(total / 3600),
                  static_cast<long long>(total / 60 % 60));
  } else if (total >= 60) {
    std::snprintf(text, sizeof text, "%lldm%02llds", static_cast<long long>(total / 60),
                  static_cast<long long>(total % 60));
  } else {
    std::snprintf(text, sizeof text, "%llds", static_cast<long long>(total));
  }
  return text;
}

std::string format_bar(double fraction, int width) {
  const int full = static_cast<int>(std::lround(std::clamp(fraction, 0.0, 1.0) * width));
  return "[" + std::string(static_cast<size_t>(full), '#') +
         std::string(static_cast<size_t>(width - full), '.') + "]";
}

bool stderr_is_terminal() {
  const char* term = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) == 1 && term != nullptr && std::strcmp(term, "dumb") != 0;
}

Progress::Progress(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      terminal_(stderr_is_terminal()),
      start_(std::chrono::steady_clock::now()),
      last_draw_(start_) {}

Progress::~Progress() {
  if (!finished_ && drawn_ && terminal_) std::fputc('\n', stderr);
}

void Progress::update(int64_t done, const std::string& note) {
  done_ = done;
  const auto now = std::chrono::steady_clock::now();
  const std::chrono::duration<double> since = now - last_draw_;
  if (since.count() < (terminal_ ? 0.1 : 10.0)) return;
  last_draw_ = now;
  note_ = note;
  draw(false);
}

void Progress::finish() {
  if (finished_) return;
  finished_ = true;
  draw(true);
}

void Progress::draw(bool last) {
  drawn_ = true;
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
  const double rate = spent.count() > 0 ? static_cast<double>(done_) / spent.count() : 0;
  const double fraction = total_ > 0 ? static_cast<double>(done_) / static_cast<double>(total_) : 0;
  std::string line = label_ + " ";
  if (total_ > 0 && terminal_) line += format_bar(fraction, 24) + " ";
  char numbers[128];
  if (total_ > 0) {
    std::snprintf(numbers, sizeof numbers, "%lld/%lld %s (%.0f%%)", static_cast<long long>(done_),
                  static_cast<long long>(total_), unit_.c_str(), 100 * fraction);
  } else {
    std::snprintf(numbers, sizeof numbers, "%lld %s", static_cast<long long>(done_), unit_.c_str());
  }
  line += numbers;
  std::snprintf(numbers, sizeof numbers, ", %.3g %s/s", rate, unit_.c_str());
  line += numbers;
  if (last) {
    line += ", took " + format_duration(spent.count());
  } else if (total_ > 0 && rate > 0) {
    line += ", " + format_duration(static_cast<double>(total_ - done_) / rate) + " left";
  }
  if (!note_.empty()) line += ", " + note_;
  if (terminal_) {
    std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace xlstm
