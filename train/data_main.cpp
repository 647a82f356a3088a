// xlstm-data: turns text into token files, checks them and describes them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/core/error.h"
#include "csrc/core/progress.h"
#include "csrc/data/prepare.h"
#include "csrc/data/token_file.h"
#include "csrc/data/tokenizer_spec.h"
#include "train/command_line.h"

namespace xlstm {
namespace {

using train::CommandLine;
using train::OptionSpec;

const std::vector<OptionSpec> kOptions = {
    {"--output", "PREFIX",
     "prepare: writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json, and PREFIX.loss where not all "
     "tokens count"},
    {"--tokenizer", "SPEC", std::string("prepare: ") + data::kTokenizerSpecs + " (default: bytes)"},
    {"--glob", "PATTERN",
     "prepare, show: which files of folders are read, by name, such as '*.py' (default: all)"},
    {"--format", "NAME",
     "prepare, show: text, jsonl, or auto: JSONL is what is named so, and standard input that "
     "begins with a brace (default: auto)"},
    {"--text-key", "KEY", "prepare, show: key of the text in a line of JSONL (default: text)"},
    {"--prompt-key", "KEY",
     "prepare, show: key of a prompt in a line of JSONL, which stands before the text and does not "
     "count in the loss (default: there are none)"},
    {"--split-at", "REGEX",
     "prepare, show: a new document begins at each line of a text that REGEX matches, as grep -E "
     "takes it (default: a text is one document)"},
    {"--limit-bytes", "N", "show: stop behind N bytes of text (default: show all)"},
    {"--no-eos", "", "prepare: documents do not end in the tokenizer's end-of-document token"},
    {"--overwrite", "",
     "prepare: replace the token file that is there (default: that is an error, unless the same "
     "command made it of the same input)"},
    {"--strict", "",
     "prepare: stop at the first document that cannot be used (default: count and skip it)"},
    {"--help", "", "this text"},
};

void print_usage(std::FILE* stream) {
  std::fprintf(
      stream,
      "usage: xlstm-data prepare INPUT... --output PREFIX [--tokenizer SPEC] [--no-eos] [--strict] "
      "[--overwrite] [OPTION]...\n"
      "       xlstm-data show INPUT... [--limit-bytes N] [OPTION]...\n"
      "       xlstm-data verify PREFIX...\n"
      "       xlstm-data stats PREFIX...\n"
      "\n"
      "prepare  turns text into a token file (Megatron's .bin and .idx, and a .meta.json). INPUT "
      "is a text file\n"
      "         (one document), .jsonl (a document per line: {\"text\": ..., \"meta\": ...}), "
      "either "
      "also as .gz or\n"
      "         .zst, a folder (everything below it but hidden files), a pattern in quotes "
      "('texts/*.txt'),\n"
      "         - (standard input), or python-stdlib (the sources of Python's standard library).\n"
      "         The text of a line may be a list, [{\"text\": ..., \"loss\": false}, {\"text\": "
      "...}], whose segments\n"
      "         without loss are read and not counted. Ids of text that is tokenized already are "
      "written by\n"
      "         libxlstm.TokenWriter in Python.\n"
      "show     prints the documents that prepare would read, each as a JSON string, or a list of "
      "segments, on a line.\n"
      "verify   compares sizes and sha256 of token files with what prepare recorded.\n"
      "stats    prints tokens, documents, their lengths, sources, vocabulary and bytes per token.\n"
      "\n%s\n"
      "exit status: 0 done, 2 wrong usage, 3 data that cannot be read, used or written\n",
      train::format_options(kOptions).c_str());
}

[[noreturn]] void fail_usage(const std::string& what) {
  throw Error(ExitCode::kConfig, what + "; see xlstm-data --help");
}

/// What was typed, but for --overwrite: a command makes the same with it and without.
std::string join(int argc, char** argv) {
  std::string text = "xlstm-data";
  for (int i = 1; i < argc; ++i)
    if (std::string_view(argv[i]) != "--overwrite") text += std::string(" ") + argv[i];
  return text;
}

long long number(int64_t value) { return static_cast<long long>(value); }

data::TextOptions text_options(const CommandLine& line) {
  data::TextOptions texts;
  texts.glob = line.get("--glob", texts.glob);
  texts.format = line.get("--format", texts.format);
  texts.text_key = line.get("--text-key", texts.text_key);
  texts.prompt_key = line.get("--prompt-key", texts.prompt_key);
  texts.split_at = line.get("--split-at", texts.split_at);
  return texts;
}

int run_prepare(const CommandLine& line, const std::vector<std::string>& inputs,
                const std::string& command) {
  if (inputs.empty()) fail_usage("prepare: no INPUT given");
  data::PrepareOptions options;
  options.inputs = inputs;
  options.output_prefix = line.get("--output", "");
  if (options.output_prefix.empty()) fail_usage("prepare: --output PREFIX is missing");
  if (line.has("--limit-bytes")) fail_usage("prepare: takes no --limit-bytes");
  options.texts = text_options(line);
  options.tokenizer = line.get("--tokenizer", options.tokenizer);
  options.append_eos = !line.has("--no-eos");
  options.strict = line.has("--strict");
  options.overwrite = line.has("--overwrite");
  options.command = command;
  const auto start = std::chrono::steady_clock::now();
  const data::PrepareReport report = data::prepare(options);
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
  const bool all_count = report.num_counted_tokens == report.num_tokens;
  std::printf("wrote %s.bin, .idx%s and .meta.json in %s\n",
              data::token_file_prefix(options.output_prefix).c_str(), all_count ? "" : ", .loss",
              format_duration(spent.count()).c_str());
  std::printf("%lld documents, %lld tokens from %lld bytes (%.3f bytes per token)\n",
              number(report.num_documents), number(report.num_tokens), number(report.num_bytes),
              static_cast<double>(report.num_bytes) / static_cast<double>(report.num_tokens));
  if (!all_count)
    std::printf("of these %lld tokens and %lld bytes count in the loss\n",
                number(report.num_counted_tokens), number(report.num_counted_bytes));
  if (report.empty_documents + report.bad_documents > 0)
    std::printf("left out: %lld empty and %lld bad documents\n", number(report.empty_documents),
                number(report.bad_documents));
  return 0;
}

int run_show(const CommandLine& line, const std::vector<std::string>& inputs) {
  if (inputs.empty()) fail_usage("show: no INPUT given");
  for (const char* option : {"--output", "--tokenizer", "--no-eos", "--strict", "--overwrite"})
    if (line.has(option)) fail_usage(std::string("show: takes no ") + option);
  const int64_t limit = line.get_int("--limit-bytes", 0, 0, std::numeric_limits<int64_t>::max());
  data::show_documents(inputs, text_options(line), limit, stdout);
  return 0;
}

int run_verify(const std::vector<std::string>& prefixes) {
  if (prefixes.empty()) fail_usage("verify: no PREFIX given");
  for (const auto& prefix : prefixes) {
    const data::TokenFile file(prefix, data::Verify::kSha256);
    file.check_vocab(file.sidecar()->vocab_size);
    std::printf("%s: good: %lld tokens in %lld documents, sha256 of .bin%s as recorded\n",
                file.prefix().c_str(), number(file.num_tokens()), number(file.num_documents()),
                file.num_counted_tokens() < file.num_tokens() ? ", .idx and .loss" : " and .idx");
  }
  return 0;
}

void print_lengths(const data::TokenFile& file) {
  std::vector<int64_t> lengths;
  for (int64_t d = 0; d < file.num_documents(); ++d)
    lengths.push_back(file.document_start(d + 1) - file.document_start(d));
  if (lengths.empty()) return;
  std::sort(lengths.begin(), lengths.end());
  const size_t half = lengths.size() / 2;
  const double median =
      lengths.size() % 2 == 1
          ? static_cast<double>(lengths[half])
          : (static_cast<double>(lengths[half - 1]) + static_cast<double>(lengths[half])) / 2;
  std::printf("  length: min %lld, median %.1f, mean %.1f, max %lld tokens\n",
              number(lengths.front()), median,
              static_cast<double>(file.num_tokens()) / static_cast<double>(lengths.size()),
              number(lengths.back()));
}

int run_stats(const std::vector<std::string>& prefixes) {
  if (prefixes.empty()) fail_usage("stats: no PREFIX given");
  for (const auto& prefix : prefixes) {
    const data::TokenFile file(prefix);
    std::printf("%s\n  tokens: %lld\n  documents: %lld\n", file.prefix().c_str(),
                number(file.num_tokens()), number(file.num_documents()));
    print_lengths(file);
    if (file.num_counted_tokens() < file.num_tokens())
      std::printf("  tokens that count in the loss: %lld\n", number(file.num_counted_tokens()));
    const auto& sidecar = file.sidecar();
    if (!sidecar) {
      std::printf("  vocabulary, sources, bytes: unknown (no %s.meta.json)\n",
                  file.prefix().c_str());
      continue;
    }
    std::printf("  tokenizer: %s\n  vocabulary: %lld, largest id used %lld, end of document %lld\n",
                sidecar->tokenizer.c_str(), number(sidecar->vocab_size),
                number(sidecar->max_token_id), number(sidecar->eos_id));
    const auto tokens = static_cast<double>(std::max<int64_t>(1, file.num_tokens()));
    if (sidecar->num_bytes > 0)
      std::printf("  bytes: %lld (%.3f per token)\n", number(sidecar->num_bytes),
                  static_cast<double>(sidecar->num_bytes) / tokens);
    else
      std::printf("  bytes: unknown\n");
    for (const auto& [source, documents] : sidecar->source_documents)
      std::printf("  source: %s: %lld documents\n", source.c_str(), number(documents));
    std::printf("  command: %s\n", sidecar->command.c_str());
  }
  return 0;
}

int run(int argc, char** argv) {
  const CommandLine line = train::parse_command_line(argc, argv, kOptions, false);
  if (line.has("--help")) {
    print_usage(stdout);
    return 0;
  }
  if (line.positional.empty()) fail_usage("which command? prepare, show, verify or stats");
  const std::string command = line.positional.front();
  const std::vector<std::string> inputs(line.positional.begin() + 1, line.positional.end());
  if (command == "prepare") return run_prepare(line, inputs, join(argc, argv));
  if (command == "show") return run_show(line, inputs);
  if (!line.options.empty()) fail_usage(command + ": takes no " + line.options.begin()->first);
  if (command == "verify") return run_verify(inputs);
  if (command == "stats") return run_stats(inputs);
  fail_usage("unknown command \"" + command + "\"");
}

}  // namespace
}  // namespace xlstm

int main(int argc, char** argv) {
  return xlstm::train::run_main("xlstm-data", "give large texts in several files",
                                [&] { return xlstm::run(argc, argv); });
}
