#include "csrc/data/prepare.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "csrc/core/error.h"
#include "csrc/core/progress.h"
#include "csrc/core/sha256.h"
#include "csrc/data/prepare_job.h"
#include "csrc/data/token_writer.h"
#include "csrc/data/utf8.h"

namespace xlstm::data {
namespace {

constexpr size_t kBytesPiece = size_t{1}
                               << 15;  ///< of a text for a bytewise tokenizer: stays in cache
constexpr size_t kDocumentPiece = size_t{16} << 20;  ///< of a long document for other tokenizers
constexpr size_t kBatchBytes = size_t{1} << 20;  ///< of small documents per call of the tokenizer
constexpr int64_t kSmallTotal = 1'000'000;       ///< bytes; progress below is counted in kB

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/// End of the first piece of at most kDocumentPiece bytes: behind a line's end that no white space follows, where
/// tokenizers that split at white space split too; else at any character.
size_t piece_end(std::string_view text) {
  if (text.size() <= kDocumentPiece) return text.size();
  for (size_t end = kDocumentPiece; end > kDocumentPiece / 2; --end)
    if (text[end - 1] == '\n' && !is_space(text[end])) return end;
  return utf8_boundary(text, kDocumentPiece);
}

/// Tokenizes documents and writes them, small ones in batches.
class DocumentWriter {
 public:
  DocumentWriter(const PrepareJob& job, Tokenizer& tokenizer, TokenWriter& writer,
                 PrepareReport& report)
      : job_(job), tokenizer_(tokenizer), writer_(writer), report_(report) {}

  void add(std::string_view text, std::string_view source) {
    if (tokenizer_.is_bytewise()) {
      for (size_t first = 0; first < text.size(); first += kBytesPiece)
        append(tokenizer_.encode(text.substr(first, kBytesPiece)));
      end_document(text.size(), source);
    } else if (text.size() > kDocumentPiece) {
      flush();
      const size_t size = text.size();
      while (!text.empty()) {
        const size_t end = piece_end(text);
        append(tokenizer_.encode(text.substr(0, end)));
        text.remove_prefix(end);
      }
      end_document(size, source);
    } else {
      texts_.emplace_back(text);
      sources_.emplace_back(source);
      batch_bytes_ += text.size();
      if (batch_bytes_ >= kBatchBytes) flush();
    }
  }

  void flush() {
    if (texts_.empty()) return;
    const std::vector<std::string_view> views(texts_.begin(), texts_.end());
    const auto encoded = tokenizer_.encode_batch(views);
    for (size_t i = 0; i < encoded.size(); ++i) {
      append(encoded[i]);
      end_document(texts_[i].size(), sources_[i]);
    }
    texts_.clear();
    sources_.clear();
    batch_bytes_ = 0;
  }
  const std::map<std::string, int64_t>& source_documents() const { return source_documents_; }

 private:
  void append(const std::vector<int64_t>& ids) {
    job_.poll();
    writer_.append(ids.data(), static_cast<int64_t>(ids.size()));
    document_tokens_ += ids.size();
  }
  void end_document(size_t num_bytes, std::string_view source) {
    if (document_tokens_ == 0) {  // a tokenizer may make nothing of a text
      ++report_.empty_documents;
      return;
    }
    const int64_t eos = tokenizer_.eos_id();
    if (job_.append_eos && eos >= 0) writer_.append(&eos, 1);
    writer_.end_document();
    document_tokens_ = 0;
    report_.num_bytes += static_cast<int64_t>(num_bytes);
    if (source != last_source_ || last_count_ == nullptr) {
      last_source_ = source;
      last_count_ = &source_documents_[last_source_];
    }
    ++*last_count_;
  }

  const PrepareJob& job_;
  Tokenizer& tokenizer_;
  TokenWriter& writer_;
  PrepareReport& report_;
  std::vector<std::string> texts_, sources_;
  size_t batch_bytes_ = 0, document_tokens_ = 0;
  std::map<std::string, int64_t> source_documents_;
  std::string last_source_;
  int64_t* last_count_ = nullptr;
};

/// The part of a document that belongs into this token file; "" for none.
std::string_view select(const PrepareJob& job, const TextFile& file, const Document& document) {
  if (job.part == Part::kAll) return document.text;
  if (file.kind == TextFile::Kind::kText) {
    const double train = static_cast<double>(document.text.size()) * (1 - job.val_fraction);
    const size_t cut = utf8_boundary(document.text, static_cast<size_t>(train));
    return job.part == Part::kTrain ? document.text.substr(0, cut) : document.text.substr(cut);
  }
  const bool held_out =
      hash_fraction(file.name + ":" + std::to_string(document.line)) < job.val_fraction;
  return held_out == (job.part == Part::kHeldOut) ? document.text : std::string_view();
}

void report_bad(const PrepareJob& job, const TextFile& file, int64_t line, const std::string& what,
                PrepareReport& report) {
  const std::string message = file.path + ":" + std::to_string(line) + ": " + what;
  if (job.strict)
    throw Error(ExitCode::kData,
                message + "; repair it, or leave out --strict to skip such documents");
  if (report.first_bad.empty()) report.first_bad = message;
  if (report.bad_documents++ < job.max_warnings)
    std::fprintf(stderr, "warning: %s (skipped)\n", message.c_str());
}

void read_all(const PrepareJob& job, DocumentWriter& writer, PrepareReport& report) {
  int64_t total = 0, done = 0;
  for (const auto& file : job.files) total += file.size_bytes;
  if (std::any_of(job.files.begin(), job.files.end(),
                  [](const TextFile& file) { return file.is_standard_input; }))
    total = 0;  // is not known
  const int64_t unit = 0 < total && total < kSmallTotal ? 1000 : 1'000'000;
  const auto units = [&](int64_t bytes) { return (bytes + unit - 1) / unit; };
  Progress progress(job.label, units(total), unit == 1000 ? "kB" : "MB");
  for (const auto& file : job.files) {
    DocumentSink sink;
    int64_t read = file.size_bytes;
    sink.document = [&](const Document& document) {
      const std::string_view text = select(job, file, document);
      if (!text.empty()) {
        writer.add(text, document.source);
      } else if (document.text.empty()) {
        ++report.empty_documents;
      }
    };
    sink.bad = [&](int64_t line, const std::string& what) {
      report_bad(job, file, line, what, report);
    };
    sink.progress = [&](int64_t position) {
      job.poll();
      if (file.is_standard_input) read = position;
      progress.update(units(done + position));
    };
    read_documents(file, job.texts, sink);
    done += read;
  }
  writer.flush();
  progress.update(units(done));
  progress.finish();
  if (report.bad_documents > job.max_warnings)
    std::fprintf(stderr, "warning: %s: %lld bad documents skipped in all\n", job.what.c_str(),
                 static_cast<long long>(report.bad_documents));
}

/// The output has a name, and is none of the texts.
void check_output(const PrepareJob& job) {
  namespace fs = std::filesystem;
  if (fs::path(job.output_prefix).filename().empty())
    throw Error(ExitCode::kConfig,
                "prepare: \"" + job.output_prefix +
                    "\" names a folder, expected a prefix: " + job.output_prefix + "NAME");
  for (const char* suffix : {".bin", ".idx", ".meta.json"}) {
    const std::string path = job.output_prefix + suffix;
    std::error_code ignored;
    if (!fs::exists(path, ignored)) continue;
    for (const auto& file : job.files)
      if (fs::equivalent(path, file.path, ignored))
        throw Error(ExitCode::kConfig, "prepare: " + file.path +
                                           " is read and would be overwritten; choose another "
                                           "output, or other inputs");
  }
}

void check_not_empty(const PrepareJob& job, const PrepareReport& report) {
  if (report.num_documents > 0) return;
  throw Error(ExitCode::kData,
              job.what + ": no text in it (" + std::to_string(job.files.size()) + " files, " +
                  std::to_string(report.empty_documents) + " empty and " +
                  std::to_string(report.bad_documents) + " bad documents); " +
                  (report.first_bad.empty() ? "give other or more text"
                                            : "the first bad one: " + report.first_bad));
}

}  // namespace

double hash_fraction(const std::string& name) {
  const std::string digits = sha256_hex(name).substr(0, 13);  // 52 bits: exact in a double
  return static_cast<double>(std::stoull(digits, nullptr, 16)) * 0x1p-52;
}

PrepareReport run_prepare(const PrepareJob& job, Tokenizer& tokenizer) try {
  if (job.append_eos && tokenizer.eos_id() < 0)
    std::fprintf(stderr,
                 "warning: tokenizer %s has no end-of-document token: documents end without one\n",
                 job.tokenizer.c_str());
  PrepareReport report;
  TokenWriter tokens(job.output_prefix, tokenizer.vocab_size());
  DocumentWriter writer(job, tokenizer, tokens, report);
  read_all(job, writer, report);
  report.num_documents = tokens.num_documents();
  report.num_tokens = tokens.num_tokens();
  check_not_empty(job, report);
  Sidecar sidecar;
  sidecar.tokenizer = job.tokenizer;
  sidecar.tokenizer_sha256 = tokenizer.sha256();
  sidecar.eos_id = tokenizer.eos_id();
  sidecar.num_bytes = report.num_bytes;
  sidecar.source_documents = writer.source_documents();
  sidecar.command = job.command;
  tokens.finish(sidecar);
  return report;
} catch (const std::system_error& error) {
  throw Error(ExitCode::kData,
              std::string("cannot write ") + error.what() +
                  "; choose an output folder with enough space that can be written");
}

void show_documents(const std::vector<std::string>& inputs, const TextOptions& texts,
                    int64_t limit_bytes, std::FILE* out) {
  struct Done {};
  PrepareJob job;
  PrepareReport report;
  int64_t left = limit_bytes;
  const auto show = [&](const Document& document) {
    std::string_view text = document.text;
    if (limit_bytes > 0) text = text.substr(0, utf8_boundary(text, static_cast<size_t>(left)));
    const std::string line = nlohmann::json(text).dump() + "\n";
    if (std::fwrite(line.data(), 1, line.size(), out) != line.size()) throw Done();
    left -= static_cast<int64_t>(document.text.size());
    if (limit_bytes > 0 && left <= 0) throw Done();
  };
  try {
    for (const auto& file : find_texts(inputs, texts))
      read_documents(
          file, texts,
          {.document = show,
           .bad = [&](int64_t line,
                      const std::string& what) { report_bad(job, file, line, what, report); },
           .progress = [](int64_t) {}});
  } catch (const Done&) {
  }
}

PrepareReport prepare(const PrepareOptions& options) {
  PrepareJob job;
  job.files = find_texts(options.inputs, options.texts);
  job.texts = options.texts;
  for (const auto& input : options.inputs) job.what += (job.what.empty() ? "" : ", ") + input;
  job.output_prefix = token_file_prefix(options.output_prefix);
  check_output(job);
  job.tokenizer = options.tokenizer;
  job.append_eos = options.append_eos;
  job.strict = options.strict;
  job.command = options.command;
  const auto tokenizer = make_tokenizer(options.tokenizer);
  return run_prepare(job, *tokenizer);
}

}  // namespace xlstm::data
