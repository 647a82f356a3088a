#pragma once
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/data/prepare.h"
#include "csrc/data/text_source.h"
#include "csrc/data/tokenizer.h"

namespace xlstm::data {

/// Which part of the texts goes into a token file. A text file is cut at a character, its last val_fraction is held
/// out; lines of JSONL are held out whole, chosen by a hash of file name and line number.
enum class Part { kAll, kTrain, kHeldOut };

struct PrepareJob {
  std::vector<TextFile> files;
  TextOptions texts;
  std::string what;  ///< names the texts in messages
  std::string label = "prepare";
  std::string output_prefix;
  std::string tokenizer;  ///< as recorded in the sidecar
  bool append_eos = true;
  bool strict = false;
  std::string command;
  std::string inputs_sha256;  ///< as recorded in the sidecar
  Part part = Part::kAll;
  double val_fraction = 0;
  int64_t max_warnings = 10;           ///< bad documents named on standard error
  std::function<void()> poll = [] {};  ///< called all the time; what it throws ends the work
};

PrepareReport run_prepare(const PrepareJob& job, Tokenizer& tokenizer);

/// What a file's content is known by: sha256 of its path and of its name, size, time.
using FileTraits = std::tuple<std::string, std::string, int64_t, int64_t>;
std::vector<FileTraits> traits_of(const std::vector<TextFile>& files);

/// A number in [0, 1) from a name, the same on every machine.
double hash_fraction(const std::string& name);

}  // namespace xlstm::data
