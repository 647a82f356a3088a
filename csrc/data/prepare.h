#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "csrc/data/token_file.h"

namespace xlstm::data {

struct PrepareOptions {
  std::vector<std::string>
      inputs;  ///< files, folders (all text below them), globs; .jsonl and .jsonl.zst by name
  std::string glob = "*";  ///< which files of a folder (matched on the name, e.g. "*.py")
  std::string
      output_prefix;  ///< writes <prefix>.bin, .idx, .meta.json, also where it ends in .bin or .idx
  std::string tokenizer = "bytes";
  bool append_eos = true;  ///< each document ends in the tokenizer's end-of-document token
  bool strict = false;  ///< a bad document stops the run; else it is counted, skipped and reported
  std::string command;  ///< recorded in the sidecar
};

struct PrepareReport {
  int64_t num_documents = 0, num_tokens = 0, num_bytes = 0;
  int64_t empty_documents = 0, bad_documents = 0;
};

/// Turns text into a token file with its sidecar, written under temporary names and renamed at the end. Progress on
/// standard error. Throws Error(kConfig): an output without name, or that is an input; Error(kData): no such input, empty
/// corpus, bad document (strict), id beyond the file's dtype.
PrepareReport prepare(const PrepareOptions& options);

/// Train and held-out token files for a text, prepared into a cache keyed by content and settings; reused when present.
struct CachedText {
  std::string train_prefix, val_prefix;
};
/// text: file, folder or glob, or "python-stdlib" (the standard library's sources of the Python on this machine).
/// val_split: "tail" (the last val_fraction of each file, cut at a character) | "file" (whole files chosen by a hash of
/// their relative name). val_text non-empty: it is the held-out text. poll: called all the time while texts are
/// prepared, or while another process does that; what it throws ends the work, and nothing half-written stays.
CachedText prepare_cached(
    const std::string& text, const std::string& val_text, double val_fraction,
    const std::string& val_split, const std::string& tokenizer, const std::string& cache_dir,
    const std::function<void()>& poll = [] {});

}  // namespace xlstm::data
