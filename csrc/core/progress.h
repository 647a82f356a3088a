#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace xlstm {

/// Progress of long work on standard error: one refreshing bar with rate and time left on a terminal, a plain line now
/// and then elsewhere. Cheap enough to call per item.
class Progress {
 public:
  /// `unit` is what is counted ("MB", "steps"); total 0 means unknown.
  Progress(std::string label, int64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// Sets the count done so far; `note` is shown behind the bar.
  void update(int64_t done, const std::string& note = "");
  /// Draws the last state and ends the line.
  void finish();

 private:
  void draw(bool last);
  std::string label_, unit_, note_;
  int64_t total_, done_ = 0;
  bool terminal_, finished_ = false, drawn_ = false;
  std::chrono::steady_clock::time_point start_, last_draw_;
};

/// "2h13m", "4m05s", "38s".
std::string format_duration(double seconds);
/// The bar itself: "[#####.....]" of `width` cells.
std::string format_bar(double fraction, int width);
/// True where standard error is a terminal that can redraw a line.
bool stderr_is_terminal();

}  // namespace xlstm
