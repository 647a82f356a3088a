#include "train/generation.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "csrc/core/error.h"
#include "train/decoder.h"

namespace xlstm::train {
namespace {

/// Prompts are taken in pieces of this many tokens, which bounds the memory of long ones.
constexpr size_t kPromptPiece = 8192;

at::Tensor ids_tensor(const std::vector<int64_t>& ids, size_t first, size_t count,
                      at::Device device) {
  const at::ArrayRef<int64_t> piece(ids.data() + first, count);
  return at::tensor(piece, at::kLong).unsqueeze(0).to(device);
}

int64_t argmax(const std::vector<double>& logits, size_t count) {
  return std::max_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(count)) -
         logits.begin();
}

void check_finite(const std::vector<double>& logits, size_t count) {
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    if (std::isnan(logits[i]) || logits[i] == INFINITY)
      throw Error(ExitCode::kNonFinite,
                  "the logit of token " + std::to_string(i) +
                      " is not finite: the weights are damaged or the training diverged");
    any = any || std::isfinite(logits[i]);
  }
  if (!any)
    throw Error(ExitCode::kNonFinite, "no token has a finite logit: the weights are damaged");
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  if (!(options.temperature >= 0) || std::isinf(options.temperature))
    throw Error(ExitCode::kConfig,
                "temperature must be a number >= 0, got " + std::to_string(options.temperature));
  if (options.top_k < 0)
    throw Error(ExitCode::kConfig, "top_k must be >= 0, got " + std::to_string(options.top_k));
  if (!(options.top_p > 0 && options.top_p <= 1))
    throw Error(ExitCode::kConfig, "top_p must be in (0,1], got " + std::to_string(options.top_p));
}

int64_t Sampler::draw(const std::vector<double>& logits) {
  size_t count = logits.size();
  if (options_.vocab_size > 0) count = std::min(count, static_cast<size_t>(options_.vocab_size));
  check_finite(logits, count);
  if (options_.temperature == 0) return argmax(logits, count);

  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  const auto before = [&](size_t a, size_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < count) {
    const auto end = order.begin() + options_.top_k;
    std::partial_sort(order.begin(), end, order.end(), before);
    order.erase(end, order.end());
  } else if (options_.top_p < 1) {
    std::sort(order.begin(), order.end(), before);
  }

  const double peak = logits[static_cast<size_t>(argmax(logits, count))];
  std::vector<double> weight(order.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    weight[i] = std::exp((logits[order[i]] - peak) / options_.temperature);
    total += weight[i];
  }
  if (options_.top_p < 1) {  // the shortest head that holds top_p of the mass, at least one token
    double head = 0;
    size_t kept = 0;
    while (kept < order.size() && (kept == 0 || head < options_.top_p * total))
      head += weight[kept++];
    order.resize(kept);
    total = head;
  }
  const double target = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
  double cumulative = 0;
  size_t last = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    if (weight[i] == 0) continue;
    cumulative += weight[i];
    last = i;
    if (target < cumulative) break;
  }
  return static_cast<int64_t>(order[last]);
}

std::vector<int64_t> generate(models::LanguageModel& model, const std::vector<int64_t>& prompt,
                              const SamplingOptions& options,
                              const std::function<void(int64_t)>& on_token) {
  if (prompt.empty())
    throw Error(ExitCode::kData, "generation needs a prompt of at least one token");
  const int64_t vocab_size = model.options().vocab_size;
  for (const int64_t id : prompt)
    if (id < 0 || id >= vocab_size)
      throw Error(ExitCode::kData,
                  "prompt token " + std::to_string(id) + " is outside the model's vocabulary of " +
                      std::to_string(vocab_size) + "; use the tokenizer it was trained with");
  Sampler sampler(options);
  const at::NoGradGuard no_grad;
  const EvalModeGuard eval_mode(model);
  const at::Device device = model.head_weight().device();

  // Only the last prompt token needs logits.
  models::ModelState state;
  for (size_t first = 0; first + 1 < prompt.size(); first += kPromptPiece) {
    const size_t count = std::min(kPromptPiece, prompt.size() - 1 - first);
    state = model.hidden(ids_tensor(prompt, first, count, device), state, {}).second;
  }
  Decoder decoder(model, std::move(state));
  std::vector<int64_t> generated;
  int64_t token = prompt.back();
  while (static_cast<int64_t>(generated.size()) < options.max_new_tokens) {
    token = sampler.draw(decoder.next(token));
    generated.push_back(token);
    if (on_token) on_token(token);
    if (token == options.stop_token) break;
  }
  return generated;
}

}  // namespace xlstm::train
