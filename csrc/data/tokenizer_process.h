#pragma once
#include <memory>
#include <string>
#include <vector>

#include "csrc/data/tokenizer.h"

namespace xlstm::data {

/// The text of libxlstm/tokenizer_worker.py, so that a program has it wherever it is.
extern const char* const kTokenizerWorker;

/// A tokenizer that runs in a Python child process (libxlstm/tokenizer_worker.py describes the messages).
std::unique_ptr<Tokenizer> make_process_tokenizer(const std::vector<std::string>& files,
                                                  const std::string& sha256);

}  // namespace xlstm::data
