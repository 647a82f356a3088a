#pragma once
// What xlstm-eval judges a model by, and the texts that it counts tokens in.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/data/batch.h"
#include "csrc/data/token_file.h"
#include "train/checkpoint.h"
#include "train/command_line.h"

namespace xlstm::train {

class TemporaryFolder;

struct NamedSet {
  std::string name;
  std::unique_ptr<data::HeldOutSet> set;
};

struct EvalData {
  std::string name;               ///< as the user knows it
  std::vector<NamedSet> sources;  ///< one, or those of a folder
  bool by_source = false;
  std::shared_ptr<const TemporaryFolder> folder;  ///< of a set that was prepared for this call
};

/// What --text or --data names, else the held-out set of the model's run; seq_len: of its windows. Throws Error: kConfig for
/// an option that does not go with the others or with the model; kData for data that is not there, has other tokens than
/// the model's, or is not what the run was judged by.
EvalData choose_data(const CommandLine& line, const LoadedModel& loaded, int64_t seq_len);

/// Where to count tokens: in what --counts names, else in the training text of the model's run. Throws Error(kData) as
/// above.
std::vector<std::shared_ptr<const data::TokenFile>> files_to_count_in(const CommandLine& line,
                                                                      const LoadedModel& loaded);

}  // namespace xlstm::train
