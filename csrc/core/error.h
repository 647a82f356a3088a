#pragma once
// Errors of the programs: one line that says what is wrong, where, and how to fix it, with a documented exit status.
#include <stdexcept>
#include <string>

namespace xlstm {

/// Exit status of every xlstm-* program; 1 is an error of another kind.
enum class ExitCode : int {
  kOk = 0,
  kConfig = 2,      ///< configuration or command line
  kData = 3,        ///< data set, tokenizer, text
  kCheckpoint = 4,  ///< checkpoint, run folder, disk
  kNonFinite = 5,   ///< a loss or gradient is not finite
  kPeer = 6,        ///< another process failed or a time limit ran out
  kMemory = 7,      ///< out of memory
  kPreempted = 75,  ///< asked to stop; everything is saved, run the same command again
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode exit_code, const std::string& message)
      : std::runtime_error(message), code(exit_code) {}
  const ExitCode code;
};

}  // namespace xlstm
