#pragma once
// Faults on demand, for tests: XLSTM_FAILPOINT=name[:n][,name[:n]...] arms points in the code.
// Unset, a point costs one getenv. Every point that exists is listed where it is passed
// ("trainer.step_end", "trainer.nan_grad", ...).
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>

namespace xlstm::train {

/// The n of an armed point (0 where none is given), nothing where it is not armed.
inline std::optional<int64_t> failpoint_value(std::string_view name) {
  const char* text = std::getenv("XLSTM_FAILPOINT");
  if (text == nullptr) return std::nullopt;
  std::string_view rest(text);
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string_view item = rest.substr(0, comma);
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
    const size_t colon = item.find(':');
    if (item.substr(0, colon) != name) continue;
    return colon == std::string_view::npos ? 0 : std::strtoll(item.data() + colon + 1, nullptr, 10);
  }
  return std::nullopt;
}

/// True where the point is armed for exactly this value (a step, a byte count).
inline bool failpoint_at(std::string_view name, int64_t value) {
  const std::optional<int64_t> armed = failpoint_value(name);
  return armed.has_value() && *armed == value;
}

/// Dies by SIGKILL, as a power cut would, where the point is armed for this value. Without a value:
/// where armed at all.
inline void failpoint(std::string_view name) {
  if (failpoint_value(name).has_value()) std::raise(SIGKILL);
}
inline void failpoint(std::string_view name, int64_t value) {
  if (failpoint_at(name, value)) std::raise(SIGKILL);
}

}  // namespace xlstm::train
