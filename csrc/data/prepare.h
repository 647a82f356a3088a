#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "csrc/data/text_source.h"
#include "csrc/data/token_file.h"

namespace xlstm::data {

struct PrepareOptions {
  std::vector<std::string> inputs;  ///< as find_texts takes them
  TextOptions texts;
  std::string
      output_prefix;  ///< writes <prefix>.bin, .idx, .meta.json (and .loss where not all tokens
                      ///< count), also where it ends in .bin or .idx
  std::string tokenizer = "bytes";
  bool append_eos = true;  ///< each document ends in the tokenizer's end-of-document token
  bool strict = false;  ///< a bad document stops the run; else it is counted, skipped and reported
  /// Whatever token file is there is replaced; else only one that the same command made of the same inputs
  bool overwrite = false;
  std::string command;  ///< recorded in the sidecar
};

struct PrepareReport {
  int64_t num_documents = 0, num_tokens = 0, num_bytes = 0;
  int64_t num_counted_tokens = 0, num_counted_bytes = 0;  ///< of them, those that count in the loss
  int64_t empty_documents = 0, bad_documents = 0;
  std::string first_bad;  ///< what is wrong with the first of these, and where
};

/// Turns text into a token file with its sidecar, written under temporary names and renamed at the end. Progress on
/// standard error. Throws Error(kConfig): an output without name, that is an input, or that is there (check_replaceable);
/// Error(kData): no such input, empty
/// corpus, bad document (strict), id beyond the file's dtype.
PrepareReport prepare(const PrepareOptions& options);

/// Writes the documents of texts, each as JSON on a line of its own, until they have limit_bytes of UTF-8 (0: no limit),
/// where the last one is cut: a string, or a list of segments as a line of JSONL may have it where there are several. Bad documents are named on standard error. Throws Error as prepare does.
void show_documents(const std::vector<std::string>& inputs, const TextOptions& texts,
                    int64_t limit_bytes, std::FILE* out);

/// Train and held-out token files for a text, prepared into a cache keyed by content and settings; reused when present.
struct CachedText {
  std::string train_prefix, val_prefix;
};
struct CacheOptions {
  std::string text = "";      ///< file, folder, glob, or kStandardLibrary
  std::string val_text = "";  ///< non-empty: the held-out text
  double val_fraction = 0.1;
  /// "tail": the last val_fraction of each file, cut at a character | "file": whole files chosen by a hash of their
  /// relative name
  std::string val_split = "tail";
  std::string text_key = "text", prompt_key = "";  ///< as TextOptions has them
  std::string tokenizer = "bytes";
  std::string cache_dir = "";  ///< "": $XDG_CACHE_HOME/libxlstm or ~/.cache/libxlstm
};
/// poll: called all the time while texts are prepared, or while another process does that; what it throws ends the work,
/// and nothing half-written stays.
CachedText prepare_cached(
    const CacheOptions& options, const std::function<void()>& poll = [] {});

}  // namespace xlstm::data
