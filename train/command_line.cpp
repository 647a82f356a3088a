#include "train/command_line.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <new>
#include <sstream>
#include <system_error>

#include "csrc/config/text.h"
#include "csrc/core/error.h"

namespace xlstm::train {
namespace {

using config::in_quotes;

constexpr auto kOtherError = static_cast<ExitCode>(1);

[[noreturn]] void fail(const std::string& what) {
  throw Error(ExitCode::kConfig, "command line: " + what);
}

bool is_name_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
         c == '.';
}

// "train.max_steps=5", also the misspelt "max_steps=5", whose error then names the right key; not
// "dir/a=b.yaml".
bool is_override(const std::string& argument) {
  const size_t equals = argument.find('=');
  if (equals == std::string::npos || equals == 0 || argument[0] == '.' ||
      (argument[0] >= '0' && argument[0] <= '9')) {
    return false;
  }
  return std::all_of(argument.begin(), argument.begin() + static_cast<ptrdiff_t>(equals),
                     is_name_char);
}

const OptionSpec& find_option(const std::string& name, const std::vector<OptionSpec>& options) {
  std::vector<std::string> names;
  for (const OptionSpec& option : options) {
    if (option.name == name) return option;
    names.push_back(option.name);
  }
  const std::string meant = config::closest_match(name, names);
  if (!meant.empty()) fail("unknown option " + in_quotes(name) + "; did you mean " + meant + "?");
  fail("unknown option " + in_quotes(name) + "; options are " + config::join(names, ", "));
}

// Reads the option at `index` and its value, and returns the index behind them.
int read_option(int index, int argc, char** argv, const std::vector<OptionSpec>& options,
                CommandLine& line) {
  const std::string argument = argv[index];
  const size_t equals = argument.find('=');
  const bool has_value = equals != std::string::npos;
  const OptionSpec& option =
      find_option(argument == "-h" ? "--help" : argument.substr(0, equals), options);
  if (option.value.empty()) {
    if (has_value) fail(option.name + " takes no value, got " + in_quotes(argument));
    line.options[option.name] = "";
    return index + 1;
  }
  if (has_value) {
    line.options[option.name] = argument.substr(equals + 1);
    return index + 1;
  }
  const bool missing = index + 1 >= argc || std::string(argv[index + 1]).starts_with("--");
  if (missing) fail(option.name + " needs a value; write " + option.name + "=" + option.value);
  line.options[option.name] = argv[index + 1];
  return index + 2;
}

// Messages are one line: a script reads them, and a multi-line text would hide what follows.
std::string one_line(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

int report(const char* program, const std::string& message, ExitCode code) {
  std::fflush(stdout);
  std::fprintf(stderr, "%s: error: %s\n", program, one_line(message).c_str());
  return static_cast<int>(code);
}

/// What an exception of torch says in its first line, without its backtrace.
std::string short_message(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  return of_torch != nullptr ? config::first_line(of_torch->what_without_backtrace())
                             : error.what();
}

int report_no_memory(const char* program, const std::exception& error, const std::string& advice) {
  const bool of_torch = dynamic_cast<const c10::Error*>(&error) != nullptr;
  return report(
      program,
      "out of memory" + (of_torch ? " (" + short_message(error) + ")" : "") + "; " + advice,
      ExitCode::kMemory);
}

/// Whether standard output is a pipe that none reads any more.
bool reader_has_left() {
  pollfd output{STDOUT_FILENO, 0, 0};
  return ::poll(&output, 1, 0) == 1 && (output.revents & POLLERR) != 0;
}

/// Throws where anything that was printed could not be written; why is known only of the last write.
void flush_output() {
  std::cout.flush();
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout) return;
  if (reader_has_left()) throw std::system_error(EPIPE, std::generic_category(), "standard output");
  throw Error(ExitCode::kCheckpoint, "standard output: cannot be written; is the disk full?");
}

/// A program may be started with standard streams closed: files that it opens would then get their numbers, and what is
/// printed would end up in them.
void open_standard_streams() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(fd, F_GETFD) == -1 && ::open("/dev/null", O_RDWR) != fd) std::_Exit(1);
}

bool is_file_error(const std::error_code& code) {
  for (const std::errc each :
       {std::errc::no_space_on_device, std::errc::read_only_file_system,
        std::errc::permission_denied, std::errc::operation_not_permitted, std::errc::io_error,
        std::errc::no_such_file_or_directory, std::errc::file_exists, std::errc::not_a_directory,
        std::errc::is_a_directory, std::errc::file_too_large, std::errc::filename_too_long,
        std::errc::too_many_files_open}) {
    if (code == each) return true;
  }
  return code == std::error_code(EDQUOT, std::generic_category());
}

}  // namespace

std::string CommandLine::get(const std::string& name, const std::string& fallback) const {
  const auto found = options.find(name);
  return found == options.end() ? fallback : found->second;
}

int64_t CommandLine::get_int(const std::string& name, int64_t fallback) const {
  if (!has(name)) return fallback;
  const auto value = config::parse_int(options.at(name));
  if (!value) fail(name + ": got " + in_quotes(options.at(name)) + ", expected an integer");
  return *value;
}

int64_t CommandLine::get_int(const std::string& name, int64_t fallback, int64_t least,
                             int64_t most) const {
  const int64_t value = get_int(name, fallback);
  if (value < least)
    fail(name + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
  if (value > most)
    fail(name + " must be at most " + std::to_string(most) + ", got " + std::to_string(value));
  return value;
}

double CommandLine::get_double(const std::string& name, double fallback) const {
  if (!has(name)) return fallback;
  const auto value = config::parse_double(options.at(name));
  if (!value) fail(name + ": got " + in_quotes(options.at(name)) + ", expected a number");
  return *value;
}

std::vector<int64_t> CommandLine::get_growing(const std::string& name) const {
  const std::string text = get(name, "");
  std::vector<int64_t> numbers;
  if (!has(name)) return numbers;
  std::istringstream stream(text + ",");
  for (std::string part; std::getline(stream, part, ',');) {
    const auto number = config::parse_int(part);
    if (!number || *number <= (numbers.empty() ? 0 : numbers.back()) || *number > kMaxNumber)
      fail(name + ": got " + in_quotes(text) + ", expected whole numbers above 0 that grow, to " +
           std::to_string(kMaxNumber) + " at most, as in 10,100");
    numbers.push_back(*number);
  }
  return numbers;
}

CommandLine parse_command_line(int argc, char** argv, const std::vector<OptionSpec>& options,
                               bool takes_settings) {
  CommandLine line;
  bool only_positional = false;
  for (int i = 1; i < argc;) {
    const std::string argument = argv[i];
    if (!only_positional && argument == "--") {
      only_positional = true;
      ++i;
    } else if (!only_positional && argument.size() > 1 && argument[0] == '-') {
      i = read_option(i, argc, argv, options, line);
    } else {
      const bool override = takes_settings && !only_positional && is_override(argument);
      (override ? line.overrides : line.positional).push_back(argument);
      ++i;
    }
  }
  return line;
}

std::string format_options(const std::vector<OptionSpec>& options) {
  size_t width = 0;
  const auto head = [](const OptionSpec& option) {
    return option.name + (option.value.empty() ? "" : " " + option.value);
  };
  for (const OptionSpec& option : options) width = std::max(width, head(option).size());
  std::string out;
  for (const OptionSpec& option : options) {
    std::string left = head(option);
    left.resize(width, ' ');
    out += "  " + left + "   " + option.help + "\n";
  }
  return out;
}

int run_main(const char* program, const std::string& memory_advice,
             const std::function<int()>& body) {
  open_standard_streams();
  for (const int signal : {SIGPIPE, SIGXFSZ})
    std::signal(signal, SIG_IGN);  // the call that fails tells
  try {
    const int status = body();
    if (status == 0) flush_output();
    return status;
  } catch (const Error& error) {
    return report(program, error.what(), error.code);
  } catch (const std::system_error& error) {
    if (error.code() == std::errc::broken_pipe) return 128 + SIGPIPE;  // as a shell has it
    return report(program, error.what(),
                  is_file_error(error.code()) ? ExitCode::kCheckpoint : kOtherError);
  } catch (const std::exception& error) {
    if (is_out_of_memory(error)) return report_no_memory(program, error, memory_advice);
    const bool value = dynamic_cast<const c10::ValueError*>(&error) != nullptr;
    return report(program, short_message(error), value ? ExitCode::kConfig : kOtherError);
  } catch (...) {
    return report(program, "unknown exception", kOtherError);
  }
}

void tell_followed_link(const std::string& given, const std::string& folder) {
  const bool of_run = std::filesystem::is_directory(std::filesystem::path(given) / "ckpt");
  if (!of_run && folder != given) std::fprintf(stderr, "%s is %s\n", given.c_str(), folder.c_str());
}

bool is_out_of_memory(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr ||
      dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr)
    return true;
  if (dynamic_cast<const c10::Error*>(&error) == nullptr) return false;
  // The CPU allocator of torch has no error class of its own, nor have libraries on the GPU.
  const std::string what = short_message(error);
  for (const char* text :
       {"allocate memory", "not enough memory", "out of memory", "posix_memalign"})
    if (what.find(text) != std::string::npos) return true;
  return false;
}

}  // namespace xlstm::train
