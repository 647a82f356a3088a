#include "train/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/base_sink.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>

namespace xlstm::train {
namespace {

std::string bar;  // what stands on the terminal's last line

void erase_bar() {
  if (!bar.empty()) std::fputs("\r\033[K", stderr);
}

void draw_bar() {
  if (bar.empty()) return;
  struct winsize window {};
  const bool known = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 1;
  const size_t width = known ? window.ws_col - 1u : 79u;
  std::fprintf(stderr, "\r\033[K%s", bar.substr(0, width).c_str());
  std::fflush(stderr);
}

void write_line(std::FILE* stream, std::string_view text) {
  erase_bar();
  std::fwrite(text.data(), 1, text.size(), stream);
  std::fflush(stream);
  draw_bar();
}

/// Information to standard output, warnings to standard error, both around the bar.
class ConsoleSink : public spdlog::sinks::base_sink<std::mutex> {
 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t text;
    formatter_->format(message, text);
    const bool warning = message.level >= spdlog::level::warn;
    write_line(warning ? stderr : stdout,
               (warning ? "warning: " : "") + std::string(text.data(), text.size()));
  }
  void flush_() override {}
};

struct Loggers {
  std::shared_ptr<ConsoleSink> console = std::make_shared<ConsoleSink>();
  std::shared_ptr<spdlog::logger> messages =
      std::make_shared<spdlog::logger>("xlstm-train", spdlog::sinks_init_list{console});
  std::shared_ptr<spdlog::sinks::basic_file_sink_mt> file;

  Loggers() {
    console->set_pattern("%v");
    messages->set_level(spdlog::level::debug);
    console->set_level(spdlog::level::info);
    // A full disk must not flood the console: the metrics writer already reports it once.
    messages->set_error_handler([](const std::string&) {});
  }
};

Loggers& loggers() {
  static Loggers instance;
  return instance;
}

}  // namespace

void set_console_verbosity(Verbosity verbosity) {
  loggers().console->set_level(verbosity == Verbosity::kQuiet    ? spdlog::level::warn
                               : verbosity == Verbosity::kNormal ? spdlog::level::info
                                                                 : spdlog::level::debug);
}

void open_log_file(const std::string& path) {
  close_log_file();
  try {
    loggers().file = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path);
  } catch (const spdlog::spdlog_ex& error) {
    log_warning(std::string("no log file: ") + error.what());
    return;
  }
  loggers().file->set_pattern("%Y-%m-%d %H:%M:%S %l: %v");
  loggers().messages->sinks().push_back(loggers().file);
  loggers().messages->flush_on(spdlog::level::info);
}

void close_log_file() {
  if (loggers().file == nullptr) return;
  loggers().messages->sinks().pop_back();
  loggers().file.reset();
}

void log_info(const std::string& message) { loggers().messages->info("{}", message); }
void log_warning(const std::string& message) { loggers().messages->warn("{}", message); }
void log_debug(const std::string& message) { loggers().messages->debug("{}", message); }

void log_to_file(const std::string& message) {
  if (loggers().file == nullptr) return;
  try {
    loggers().file->log(spdlog::details::log_msg("", spdlog::level::info, message));
    loggers().file->flush();
  } catch (const spdlog::spdlog_ex&) {  // a full disk, reported by the metrics writer
  }
}

void print_line(const std::string& text) { write_line(stdout, text + "\n"); }

void show_bar(const std::string& line) {
  if (line.empty()) erase_bar();
  bar = line;
  if (line.empty()) std::fflush(stderr);
  draw_bar();
}

}  // namespace xlstm::train
