// xlstm-generate: text in, text out.
#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <string>
#include <system_error>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "train/checkpoint.h"
#include "train/command_line.h"
#include "train/device.h"
#include "train/generation.h"
#include "train/text_stream.h"

namespace xlstm::train {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kSideBySide = 16;  // samples: each has a state of its own in memory
constexpr const char* kBetweenSamples = "---------------\n";

const std::vector<OptionSpec> kOptions{
    {"--prompt", "TEXT",
     "text to continue; without it and --prompt-file: standard input, where it is no terminal"},
    {"--prompt-file", "FILE", "text to continue, from a file"},
    {"--max-new-tokens", "N", "tokens to generate (256)"},
    {"--temperature", "X", "below 1 sharper, above 1 wilder; 0 is greedy (0.8)"},
    {"--top-k", "N", "draw from the N most likely tokens; 0: all (0)"},
    {"--top-p", "X", "draw from the most likely tokens that hold this probability (1.0)"},
    {"--seed", "N", "sample i uses seed N+i (42)"},
    {"--greedy", "", "always the most likely token"},
    {"--num-samples", "N", "how many continuations, drawn side by side, 16 at a time (1)"},
    {"--device", "NAME", "cpu, cuda or auto: a GPU where there is one (auto)"},
    {"--dtype", "NAME",
     "float32; bfloat16_weights: the weights are rounded, which halves the memory and what a token "
     "reads; int8_weights: large matrices to 8 bits, the rest to bfloat16 (float32)"},
    {"--threads", "N", "CPU threads; 0: all cores (0)"},
    {"--no-bos", "",
     "put nothing before the prompt; else models imported from transformers read the token there "
     "that their source says"},
    {"--no-echo", "", "print the continuation without the prompt"},
    {"--no-verify", "", "skip the checksums of the checkpoint"},
    {"--help", "", "show this"}};

std::string read_prompt(const CommandLine& line) {
  if (line.has("--prompt") && line.has("--prompt-file"))
    throw Error(ExitCode::kConfig, "--prompt and --prompt-file exclude each other; give one");
  if (line.has("--prompt")) return line.get("--prompt", "");
  if (line.has("--prompt-file")) return read_file(line.get("--prompt-file", ""), ExitCode::kData);
  if (::isatty(STDIN_FILENO) != 0) return "";
  return read_file(STDIN_FILENO, "standard input", ExitCode::kData);
}

SamplingOptions sampling_options(const CommandLine& line, const data::Tokenizer& tokenizer) {
  SamplingOptions options;
  options.max_new_tokens = line.get_int("--max-new-tokens", 256, 0);
  options.temperature = line.has("--greedy") ? 0.0 : line.get_double("--temperature", 0.8);
  options.top_k = line.get_int("--top-k", 0, 0);
  options.top_p = line.get_double("--top-p", 1.0);
  options.stop_token = tokenizer.eos_id();
  options.vocab_size = tokenizer.vocab_size();
  return options;
}

/// Where there is neither a prompt nor a token before it: the end of the document before, or for bytes a line's end.
std::vector<int64_t> encode_prompt(const std::string& text, data::Tokenizer& tokenizer,
                                   const std::string& spec, bool with_bos) {
  std::vector<int64_t> ids =
      with_bos ? data::encode_prompt(tokenizer, text) : tokenizer.encode(text);
  if (!ids.empty()) return ids;
  if (spec == "bytes") return tokenizer.encode("\n");
  if (tokenizer.eos_id() >= 0) return {tokenizer.eos_id()};
  throw Error(ExitCode::kData,
              "the prompt is empty and the tokenizer has no end-of-document token; give --prompt");
}

void show(const std::string& text) {
  const size_t written = std::fwrite(text.data(), 1, text.size(), stdout);
  if (written != text.size() || std::fflush(stdout) != 0)
    throw std::system_error(errno, std::generic_category(), "standard output");
}

/// How fast the prompt was read and its continuations were drawn, on standard error.
void print_speed(size_t prompt, int64_t first_tokens, int64_t tokens, Clock::duration reading,
                 Clock::duration drawing) {
  const auto rate = [](double count, Clock::duration time) {
    return count / std::max(std::chrono::duration<double>(time).count(), 1e-9);
  };
  if (tokens == 0) return;
  std::fprintf(stderr, "prompt: %zu tokens, %.1f tokens/s", prompt,
               rate(static_cast<double>(prompt), reading));
  if (tokens > first_tokens)
    std::fprintf(stderr, " | decode: %lld tokens, %.1f tokens/s", static_cast<long long>(tokens),
                 rate(static_cast<double>(tokens - first_tokens), drawing));
  std::fputc('\n', stderr);
}

/// Draws `count` continuations side by side. The first is printed as it is drawn, the others behind it.
void print_samples(LoadedModel& loaded, data::Tokenizer& tokenizer, const std::string& text,
                   const std::vector<int64_t>& prompt, const SamplingOptions& options,
                   size_t count) {
  std::vector<TextStream> streams(count, TextStream(tokenizer, prompt));
  std::vector<std::string> waiting(count);
  const auto start = Clock::now();
  auto first_token = start;
  int64_t tokens = 0;
  show(text);
  generate_batch(*loaded.model, std::vector(count, prompt), options, [&](size_t i, int64_t id) {
    if (tokens++ == 0) first_token = Clock::now();
    if (id == options.stop_token) return;
    if (i == 0) {
      show(streams[i].push(id));
    } else {
      waiting[i] += streams[i].push(id);
    }
  });
  const auto end = Clock::now();
  show(streams[0].finish() + "\n");
  for (size_t i = 1; i < count; ++i)
    show(kBetweenSamples + text + waiting[i] + streams[i].finish() + "\n");
  print_speed(prompt.size(), static_cast<int64_t>(count), tokens, first_token - start,
              end - first_token);
}

int body(int argc, char** argv) {
  const CommandLine line = parse_command_line(argc, argv, kOptions, false);
  if (line.has("--help")) {
    show(
        "usage: xlstm-generate CHECKPOINT|RUN_FOLDER [options]\n\nContinues a text with a trained "
        "model.\n\n" +
        format_options(kOptions));
    return 0;
  }
  if (line.positional.size() != 1)
    throw Error(ExitCode::kConfig,
                "expected one checkpoint or run folder; see xlstm-generate --help");
  if (const int64_t threads = line.get_threads(); threads > 0)
    at::set_num_threads(static_cast<int>(threads));
  const int64_t num_samples = line.get_int("--num-samples", 1, 1);
  const int64_t seed = line.get_int("--seed", 42);
  const std::string text = read_prompt(line);

  const at::Device device = choose_device(line.get("--device", "auto"), "--device");
  use_own_stream(device);
  LoadedModel loaded = load_model(line.positional[0], !line.has("--no-verify"),
                                  choose_weights_dtype(line.get("--dtype", "float32"), "--dtype"));
  tell_followed_link(line.positional[0], loaded.folder);
  loaded.model->to(device);
  const auto tokenizer = data::make_tokenizer(loaded.tokenizer);
  SamplingOptions options = sampling_options(line, *tokenizer);
  const std::vector<int64_t> prompt =
      encode_prompt(text, *tokenizer, loaded.tokenizer, !line.has("--no-bos"));
  for (int64_t done = 0; done < num_samples; done += kSideBySide) {
    if (done > 0) show(kBetweenSamples);
    options.seed = static_cast<uint64_t>(seed) + static_cast<uint64_t>(done);
    print_samples(loaded, *tokenizer, line.has("--no-echo") ? "" : text, prompt, options,
                  static_cast<size_t>(std::min(kSideBySide, num_samples - done)));
  }
  return 0;
}

}  // namespace
}  // namespace xlstm::train

int main(int argc, char** argv) {
  return xlstm::train::run_main(
      "xlstm-generate", "give a shorter prompt, fewer of --num-samples, or --dtype int8_weights",
      [&] { return xlstm::train::body(argc, argv); });
}
