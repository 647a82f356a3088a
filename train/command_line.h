#pragma once
// The command line shared by all programs: `program POSITIONAL... [--flag] [--option VALUE]`, and
// `[key.sub=value ...]` where they take settings.
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace xlstm::train {

/// Sizes and counts are at most this, so that products of two do not overflow.
constexpr int64_t kMaxNumber = std::numeric_limits<int32_t>::max();

struct OptionSpec {
  std::string name;   ///< "--max-new-tokens"
  std::string value;  ///< "N"; "" for a flag without value
  std::string help;
};

struct CommandLine {
  std::vector<std::string> positional;
  std::vector<std::string> overrides;          ///< arguments of the form key.sub=value
  std::map<std::string, std::string> options;  ///< given options by name ("--seed"); "" for flags
  bool has(const std::string& name) const { return options.count(name) != 0; }
  std::string get(const std::string& name, const std::string& fallback) const;
  int64_t get_int(const std::string& name,
                  int64_t fallback) const;  ///< throws Error(kConfig) on text
  /// Throws Error(kConfig) below `least` and above `most` too.
  int64_t get_int(const std::string& name, int64_t fallback, int64_t least,
                  int64_t most = kMaxNumber) const;
  int64_t get_threads() const { return get_int("--threads", 0, 0, 4096); }
  double get_double(const std::string& name, double fallback) const;
  /// "10,100" -> {10, 100}; {} where it is not given. Throws Error(kConfig) for anything but whole
  /// numbers of 1 to kMaxNumber that grow.
  std::vector<int64_t> get_growing(const std::string& name) const;
};

/// An option's value is the next argument or follows a '=' ("--seed=1"); a value that starts with
/// "--" needs the '='. The last of several values counts. Behind "--" everything is positional;
/// "name.sub=text" before it is an override where the program `takes_settings`. Throws Error(kConfig) for unknown options (with a
/// suggestion), missing values, and values of flags.
CommandLine parse_command_line(int argc, char** argv, const std::vector<OptionSpec>& options,
                               bool takes_settings);
/// "--name VALUE   help" lines.
std::string format_options(const std::vector<OptionSpec>& options);

/// Runs a program's body and turns what it throws into one line `program: error: ...` on standard
/// error and the exit status: Error -> its code, no memory -> 7 with `memory_advice`, a failed file
/// operation -> 4, c10::ValueError (a value that a model refuses) -> 2, other -> 1; of c10::Error
/// the first line. Output that could not be written is such a failure, too. SIGPIPE is ignored, but
/// a reader of the output that has left ends the program as that signal does: 141, without a word.
/// Standard streams that are closed are /dev/null from here on, so call it before a file is opened.
int run_main(const char* program, const std::string& memory_advice,
             const std::function<int()>& body);

/// Says on standard error which checkpoint was read, `folder`, where a link to it was given.
void tell_followed_link(const std::string& given, const std::string& folder);

/// Whether there was not enough memory, of the machine or of a GPU.
bool is_out_of_memory(const std::exception& error);

}  // namespace xlstm::train
