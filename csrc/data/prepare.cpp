#include "csrc/data/prepare.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/core/progress.h"
#include "csrc/core/sha256.h"
#include "csrc/core/utf8.h"
#include "csrc/data/prepare_job.h"
#include "csrc/data/token_writer.h"

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

  void add(std::span<const Segment> segments, std::string_view source) {
    const bool bytewise = tokenizer_.is_bytewise();
    if (bytewise || text_bytes(segments) > kDocumentPiece) {
      flush();
      for (const Segment& segment : segments) add_in_pieces(segment, document_.bytes > 0);
      end_document(source);
      return;
    }
    bool inside = false;
    for (const auto& [text, loss] : segments) {
      parts_.push_back({std::string(text), loss, inside, false});
      inside = inside || !text.empty();
      batch_bytes_ += text.size();
    }
    parts_.back().ends_document = true;
    sources_.emplace_back(source);
    if (batch_bytes_ >= kBatchBytes) flush();
  }

  void flush() {
    if (parts_.empty()) return;
    std::vector<std::string_view> first, inside;
    for (const Part& part : parts_) (part.inside ? inside : first).push_back(part.text);
    const auto first_ids = tokenizer_.encode_batch(first);
    const auto inside_ids =
        inside.empty() ? decltype(first_ids){} : tokenizer_.encode_inside(inside);
    auto next_first = first_ids.begin(), next_inside = inside_ids.begin();
    auto source = sources_.begin();
    for (const Part& part : parts_) {
      append(part.inside ? *next_inside++ : *next_first++, part.text.size(), part.loss);
      if (part.ends_document) end_document(*source++);
    }
    parts_.clear();
    sources_.clear();
    batch_bytes_ = 0;
  }
  const std::map<std::string, int64_t>& source_documents() const { return source_documents_; }

 private:
  /// A segment in a batch of small documents. inside: text of its document stands before it.
  struct Part {
    std::string text;
    bool loss, inside, ends_document;
  };
  /// Of the document under construction.
  struct Written {
    int64_t tokens = 0, bytes = 0, counted_bytes = 0;
    bool end_counts = true;  ///< as the last segment does
  };

  /// inside: it goes on in a document.
  void add_in_pieces(const Segment& segment, bool inside) {
    std::string_view text = segment.text;
    do {
      const size_t end =
          tokenizer_.is_bytewise() ? std::min(text.size(), kBytesPiece) : piece_end(text);
      const std::string_view piece = text.substr(0, end);
      append(inside ? tokenizer_.encode_inside({piece}).front() : tokenizer_.encode(piece), end,
             segment.loss);
      text.remove_prefix(end);
    } while (!text.empty());
  }
  void append(const std::vector<int64_t>& ids, size_t num_bytes, bool loss) {
    job_.poll();
    writer_.append(ids.data(), std::ssize(ids), loss);
    document_.tokens += std::ssize(ids);
    document_.bytes += static_cast<int64_t>(num_bytes);
    if (loss) document_.counted_bytes += static_cast<int64_t>(num_bytes);
    document_.end_counts = loss;
  }
  void end_document(std::string_view source) {
    const Written document = std::exchange(document_, {});
    if (document.tokens == 0) {  // a tokenizer may make nothing of a text
      ++report_.empty_documents;
      return;
    }
    const int64_t eos = tokenizer_.eos_id();
    if (job_.append_eos && eos >= 0) writer_.append(&eos, 1, document.end_counts);
    writer_.end_document();
    report_.num_bytes += document.bytes;
    report_.num_counted_bytes += document.counted_bytes;
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
  std::vector<Part> parts_;
  std::vector<std::string> sources_;  ///< of the documents of these parts
  size_t batch_bytes_ = 0;
  Written document_;
  std::map<std::string, int64_t> source_documents_;
  std::string last_source_;
  int64_t* last_count_ = nullptr;
};

/// What of a document belongs into this token file; none where nothing does. part: room for a text that is cut.
std::span<const Segment> select(const PrepareJob& job, const TextFile& file,
                                const Document& document, Segment& part) {
  if (job.part == Part::kAll) return document.segments;
  if (file.kind == TextFile::Kind::kText) {
    const std::string_view text = document.segments.front().text;
    const double train = static_cast<double>(text.size()) * (1 - job.val_fraction);
    const size_t cut = utf8_boundary(text, static_cast<size_t>(train));
    part.text = job.part == Part::kTrain ? text.substr(0, cut) : text.substr(cut);
    return {&part, 1};
  }
  const bool held_out =
      hash_fraction(file.name + ":" + std::to_string(document.line)) < job.val_fraction;
  if (held_out != (job.part == Part::kHeldOut)) return {};
  return document.segments;
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
      Segment part;
      const std::span<const Segment> segments = select(job, file, document, part);
      if (text_bytes(segments) > 0) {
        writer.add(segments, document.source);
      } else if (text_bytes(document.segments) == 0) {
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

/// The output is none of the texts.
void check_output(const PrepareJob& job) {
  namespace fs = std::filesystem;
  for (const char* suffix : {".bin", ".idx", ".loss", ".meta.json"}) {
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
  const std::string remedy = !report.first_bad.empty() ? "the first bad one: " + report.first_bad
                             : job.part == Part::kAll
                                 ? "give other or more text"
                                 : "give more text, another data.val_fraction, or a data.val_text";
  throw Error(ExitCode::kData, job.what + ": no text in it (" + std::to_string(job.files.size()) +
                                   " files, " + std::to_string(report.empty_documents) +
                                   " empty and " + std::to_string(report.bad_documents) +
                                   " bad documents); " + remedy);
}

}  // namespace

std::vector<FileTraits> traits_of(const std::vector<TextFile>& files) {
  std::vector<FileTraits> traits;
  for (const auto& file : files)
    traits.emplace_back(sha256_hex(file.path), sha256_hex(file.name), file.size_bytes,
                        file.modified_ns);
  return traits;
}

double hash_fraction(const std::string& name) {
  const std::string digits = sha256_hex(name).substr(0, 13);  // 52 bits: exact in a double
  return static_cast<double>(std::stoull(digits, nullptr, 16)) * 0x1p-52;
}

PrepareReport run_prepare(const PrepareJob& job, Tokenizer& tokenizer) try {
  if (job.append_eos && tokenizer.eos_id() < 0)
    std::fprintf(stderr,
                 "warning: tokenizer %s has no end-of-document token: documents end without one\n",
                 job.tokenizer.c_str());
  check_formats(job.files);
  PrepareReport report;
  TokenWriter tokens(job.output_prefix, tokenizer.vocab_size());
  DocumentWriter writer(job, tokenizer, tokens, report);
  read_all(job, writer, report);
  report.num_documents = tokens.num_documents();
  report.num_tokens = tokens.num_tokens();
  report.num_counted_tokens = tokens.num_counted_tokens();
  check_not_empty(job, report);
  Sidecar sidecar;
  sidecar.tokenizer = job.tokenizer;
  sidecar.tokenizer_sha256 = tokenizer.sha256();
  sidecar.eos_id = tokenizer.eos_id();
  sidecar.num_bytes = report.num_bytes;
  sidecar.num_counted_bytes = report.num_counted_bytes;
  sidecar.source_documents = writer.source_documents();
  sidecar.command = job.command;
  sidecar.inputs_sha256 = job.inputs_sha256;
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
    auto list = nlohmann::ordered_json::array();
    for (const auto& [whole, loss] : document.segments) {
      std::string_view text = whole;
      if (limit_bytes > 0) text = text.substr(0, utf8_boundary(text, static_cast<size_t>(left)));
      list.push_back({{"text", text}, {"loss", loss}});
      left -= static_cast<int64_t>(whole.size());
      if (limit_bytes > 0 && left <= 0) break;
    }
    const bool plain = document.segments.size() == 1 && document.segments[0].loss;
    const std::string line = (plain ? list[0]["text"] : list).dump() + "\n";
    if (std::fwrite(line.data(), 1, line.size(), out) != line.size()) throw Done();
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
  job.output_prefix = output_prefix(options.output_prefix);
  job.tokenizer = options.tokenizer;
  job.append_eos = options.append_eos;
  job.strict = options.strict;
  job.command = options.command;
  if (std::none_of(job.files.begin(), job.files.end(),
                   [](const TextFile& file) { return file.is_standard_input; }))
    job.inputs_sha256 = sha256_hex(nlohmann::json(traits_of(job.files)).dump());
  check_output(job);
  if (!options.overwrite) {
    Sidecar next;
    next.command = job.command;
    next.inputs_sha256 = job.inputs_sha256;
    next.tokenizer_sha256 = tokenizer_sha256(job.tokenizer);
    check_replaceable(job.output_prefix, next);
  }
  const auto tokenizer = make_tokenizer(options.tokenizer);
  return run_prepare(job, *tokenizer);
}

}  // namespace xlstm::data
