#pragma once
// Messages of the trainer: to the console and, with the time, to <run>/run.log. A progress bar on
// the terminal's last line is taken away before a message and drawn again behind it.
#include <string>

namespace xlstm::train {

enum class Verbosity {
  kQuiet,
  kNormal,
  kDebug
};  ///< kQuiet: warnings alone (the file still gets everything)

void set_console_verbosity(Verbosity verbosity);
/// Also appends messages to `path` from now on. A file that cannot be written is reported once and
/// costs nothing else.
void open_log_file(const std::string& path);
void close_log_file();

void log_info(const std::string& message);
void log_warning(const std::string& message);
void log_debug(const std::string& message);
/// To the file alone.
void log_to_file(const std::string& message);
/// To standard output alone, whatever the verbosity, behind a cleared bar: results and samples.
void print_line(const std::string& text);

/// Draws `line` as the bar on standard error, cut to the terminal's width; "" takes it away.
void show_bar(const std::string& line);

}  // namespace xlstm::train
