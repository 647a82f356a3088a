// xlstm-eval: loss, perplexity and bits per byte of a saved model at any context length, or its accuracy in its task.
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/error.h"
#include "train/checkpoint.h"
#include "train/command_line.h"
#include "train/device.h"
#include "train/eval_data.h"
#include "train/eval_report.h"
#include "train/evaluation.h"
#include "train/schedule.h"
#include "train/token_frequency.h"

namespace xlstm::train {
namespace {

const std::vector<OptionSpec> kOptions{
    {"--data", "PREFIX|FOLDER",
     "prepared token file, or a folder of such, one for each source, which are judged apart and "
     "together (default: the run's own held-out set, if it is still what it was)"},
    {"--text", "FILE", "text file, folder, glob, or - (standard input), tokenised on the spot"},
    {"--seq-len", "N", "context length; may exceed the trained one (data.seq_len)"},
    {"--min-len", "N", "of a data.task: tokens of its shortest sample (data.task.eval_min_len)"},
    {"--held-out", "NAME", "of a data.task: test or validation (data.task.held_out)"},
    {"--batch-size", "N", "windows per forward pass (as in training, fewer for longer windows)"},
    {"--batches", "N",
     "stop after so many batches of train.global_batch_size windows of every set, as eval.batches "
     "counts them; with --batch-size of as many as that says; 0: the whole set (0)"},
    {"--fill-last", "",
     "every document is judged alone: its windows begin with it, and the last of a longer one "
     "begins earlier, so that it is as long as the others; what has been judged before does not "
     "count again"},
    {"--frequency-buckets", "N,...",
     "also the perplexity of tokens by how often they occur in the training text: 10,100 judges "
     "those that occur 0 to 9 times, 10 to 99 times, and more often"},
    {"--counts", "PREFIX", "token file to count them in (the run's training data)"},
    {"--json", "FILE", "also write the numbers there"},
    {"--device", "NAME", "cpu, cuda or auto: a GPU where there is one (auto)"},
    {"--dtype", "NAME",
     "float32; bfloat16: autocast, as in training; bfloat16_weights: the weights are rounded too, "
     "which halves their memory; int8_weights: large matrices to 8 bits (train.dtype)"},
    {"--threads", "N", "CPU threads; 0: all cores (0)"},
    {"--no-verify", "", "skip the checksums of the checkpoint"},
    {"--help", "", "show this"}};

/// What --frequency-buckets asks for.
struct Buckets {
  std::vector<int64_t> edges;
  TokenGroups groups;
};

std::optional<Buckets> choose_buckets(const CommandLine& line, const LoadedModel& loaded) {
  if (!line.has("--frequency-buckets")) {
    if (line.has("--counts"))
      throw Error(ExitCode::kConfig, "--counts is for --frequency-buckets; give both");
    return {};
  }
  Buckets buckets{line.get_growing("--frequency-buckets"), {}};
  buckets.edges.insert(buckets.edges.begin(), 0);
  buckets.groups = frequency_buckets(
      count_tokens(files_to_count_in(line, loaded), loaded.config.model.vocab_size), buckets.edges);
  return buckets;
}

EvalReport judge(const LoadedModel& loaded, const EvalData& data, int64_t seq_len,
                 int64_t batch_size, int64_t windows, bool autocast,
                 const std::optional<Buckets>& buckets) {
  EvalReport report;
  report.checkpoint = loaded.folder;
  report.data = data.name;
  report.seq_len = seq_len;
  report.trained_seq_len = loaded.config.data.seq_len;
  if (buckets) report.bucket_edges = buckets->edges;
  const auto start = std::chrono::steady_clock::now();
  for (const auto& [name, set] : data.sources)
    report.sources.push_back({name, evaluate(*loaded.model, *set, batch_size,
                                             {.max_windows = windows,
                                              .bfloat16 = autocast,
                                              .show_progress = true,
                                              .groups = buckets ? &buckets->groups : nullptr})});
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (data.by_source) {
    report.result = combined(report.sources);
  } else {
    report.result = std::move(report.sources[0].result);
    report.sources.clear();
  }
  return report;
}

int body(int argc, char** argv) {
  const CommandLine line = parse_command_line(argc, argv, kOptions, false);
  if (line.has("--help")) {
    std::cout
        << "usage: xlstm-eval CHECKPOINT|RUN_FOLDER [options]\n\nLoss, perplexity and bits "
           "per byte of a trained model. The first token of a document is not judged, and its "
           "bytes do\nnot count; where tokens are of several bytes, each counts with the "
           "mean of the data's.\n\n"
        << format_options(kOptions);
    return 0;
  }
  if (line.positional.size() != 1)
    throw Error(ExitCode::kConfig, "expected one checkpoint or run folder; see xlstm-eval --help");
  if (const int64_t threads = line.get_threads(); threads > 0)
    at::set_num_threads(static_cast<int>(threads));

  const at::Device device = choose_device(line.get("--device", "auto"), "--device");
  use_own_stream(device);
  const std::string given = line.get("--dtype", "");
  LoadedModel loaded = load_model(
      line.positional[0], !line.has("--no-verify"),
      choose_weights_dtype(given.empty() ? "float32" : given, "--dtype", /*autocast=*/true));
  // Its data may be looked for in another folder.
  if (loaded.tokenizer != "bytes") loaded.tokenizer = std::filesystem::absolute(loaded.tokenizer);
  tell_followed_link(line.positional[0], loaded.folder);
  loaded.model->to(device);
  const config::Config& config = loaded.config;
  const int64_t held_out_len = data::is_given(config.data.task) ? config.data.task.eval_len : 0;
  const int64_t seq_len =
      line.get_int("--seq-len", held_out_len > 0 ? held_out_len : config.data.seq_len, 1);
  const int64_t batch_size =
      line.get_int("--batch-size",
                   std::max<int64_t>(1, micro_batch(config, 1) * config.data.seq_len / seq_len), 1);
  const int64_t windows = line.get_int("--batches", 0, 0) *
                          (line.has("--batch-size") ? batch_size : config.train.global_batch_size);

  const EvalData data = choose_data(line, loaded, seq_len);
  const std::optional<Buckets> buckets = choose_buckets(line, loaded);
  const EvalReport report =
      judge(loaded, data, seq_len, batch_size, windows,
            (given.empty() ? config.train.dtype : given) == "bfloat16", buckets);
  print_report(report);
  if (line.has("--json")) write_report(line.get("--json", ""), report);
  return 0;
}

}  // namespace
}  // namespace xlstm::train

int main(int argc, char** argv) {
  return xlstm::train::run_main("xlstm-eval",
                                "lower --batch-size or --seq-len, or give --dtype int8_weights",
                                [&] { return xlstm::train::body(argc, argv); });
}
