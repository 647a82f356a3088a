#include <algorithm>
#include <cmath>
#include <cstdio>

#include "csrc/core/progress.h"
#include "train/log.h"
#include "train/metrics.h"
#include "train/step_timer.h"

namespace xlstm::train {
namespace {

template <typename... Arguments>
std::string format(const char* pattern, Arguments... arguments) {
  char text[160];
  std::snprintf(text, sizeof text, pattern, arguments...);
  return text;
}

std::string number_or_dash(const char* pattern, std::optional<double> value) {
  return value ? format(pattern, *value) : "-";
}

}  // namespace

std::string format_number(const char* pattern, double value) { return format(pattern, value); }

std::string format_count(double value) {
  if (value >= 999.5e6) return format("%.3gG", value / 1e9);
  if (value >= 999.5e3) return format("%.3gM", value / 1e6);
  if (value >= 999.5) return format("%.3gk", value / 1e3);
  return format("%.3g", value);
}

std::string format_thousands(int64_t value) {
  std::string text = std::to_string(value);
  const int64_t first_digit = value < 0 ? 1 : 0;
  for (int64_t at = static_cast<int64_t>(text.size()) - 3; at > first_digit; at -= 3) {
    text.insert(static_cast<size_t>(at), ",");
  }
  return text;
}

std::string format_step(const ConsoleStep& step) {
  std::string line = format("step %lld/%lld | loss ", static_cast<long long>(step.step),
                            static_cast<long long>(step.total_steps)) +
                     number_or_dash("%.4f", step.loss) + " | ";
  if (step.in_nats && step.loss) {
    const double perplexity = std::exp(*step.loss);
    line += perplexity < 1e5 ? format("ppl %.*f | ", perplexity < 100 ? 2 : 1, perplexity)
                             : format("ppl %.3g | ", perplexity);
  }
  line +=
      "gnorm " + number_or_dash("%.2f", step.grad_norm) + format(" | lr %.1e", step.learning_rate);
  if (step.tokens_per_s > 0) {
    line += " | " + format_count(step.tokens_per_s) + " tok/s";
    line += format(" | data %.0f%%", 100 * step.data_fraction);
  }
  if (step.seconds_left >= 0) line += " | eta " + format_duration(step.seconds_left);
  return line;
}

std::string format_bar_line(const ConsoleStep& step) {
  const double fraction = static_cast<double>(step.step) / static_cast<double>(step.total_steps);
  std::string line =
      format_bar(fraction, 20) + format(" %lld/%lld", static_cast<long long>(step.step),
                                        static_cast<long long>(step.total_steps));
  if (step.seconds_left >= 0) line += " | eta " + format_duration(step.seconds_left);
  line += " | loss " + number_or_dash("%.4f", step.loss);
  if (step.tokens_per_s > 0) line += " | " + format_count(step.tokens_per_s) + " tok/s";
  return line + format(" | lr %.1e | gnorm ", step.learning_rate) +
         number_or_dash("%.2f", step.grad_norm);
}

Console::Console(const std::string& mode) {
  bar_ = mode == "bar" || (mode == "auto" && stderr_is_terminal());
  plain_ = mode == "plain" || (mode == "auto" && !bar_);
}

Console::~Console() { finish(); }

void Console::step(const ConsoleStep& step, bool logged) {
  if (logged && plain_) print_line(format_step(step));
  if (logged) log_to_file(format_step(step));
  if (!bar_) return;
  const double now = monotonic_seconds();
  if (now - last_draw_ < 0.1 && step.step < step.total_steps) return;
  last_draw_ = now;
  show_bar(format_bar_line(step));
}

void Console::finish() {
  if (bar_) show_bar("");
}

}  // namespace xlstm::train
