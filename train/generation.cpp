#include "train/generation.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <tuple>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/models/model_kinds.h"
#include "csrc/models/padded_batch.h"
#include "csrc/nn/no_dropout.h"
#include "train/decoder.h"

namespace xlstm::train {
namespace {

/// Prompts are taken in pieces of this many tokens, which bounds the memory of long ones.
constexpr int64_t kPromptPiece = 8192;

using Prompts = std::vector<std::vector<int64_t>>;

void check_prompts(const Prompts& prompts, int64_t vocab_size) {
  for (const std::vector<int64_t>& prompt : prompts) {
    if (prompt.empty())
      throw Error(ExitCode::kData, "generation needs a prompt of at least one token");
    for (const int64_t id : prompt)
      if (id < 0 || id >= vocab_size)
        throw Error(ExitCode::kData, "prompt token " + std::to_string(id) +
                                         " is outside the model's vocabulary of " +
                                         std::to_string(vocab_size) +
                                         "; use the tokenizer it was trained with");
  }
}

/// Prompts (B,T) as one tensor, with zeros behind the shorter ones, and their lengths (B).
std::pair<at::Tensor, at::Tensor> padded_prompts(const Prompts& prompts) {
  const auto batch = static_cast<int64_t>(prompts.size());
  const at::Tensor lengths = at::empty({batch}, at::kLong);
  for (int64_t row = 0; row < batch; ++row)
    lengths.mutable_data_ptr<int64_t>()[row] =
        static_cast<int64_t>(prompts[static_cast<size_t>(row)].size());
  at::Tensor ids = at::zeros({batch, lengths.max().item<int64_t>()}, at::kLong);
  for (int64_t row = 0; row < batch; ++row) {
    const auto& prompt = prompts[static_cast<size_t>(row)];
    std::copy(prompt.begin(), prompt.end(), ids[row].mutable_data_ptr<int64_t>());
  }
  return {ids, lengths};
}

/// Logits (B,V) behind the prompts and the state there.
std::pair<at::Tensor, models::ModelState> read_prompts(models::LanguageModel& model,
                                                       const Prompts& prompts) {
  auto [ids, lengths] = padded_prompts(prompts);
  const int64_t batch = ids.size(0), length = ids.size(1);
  at::Tensor reset = at::zeros({batch, length}, at::kBool);
  if (lengths.min().item<int64_t>() < length) {
    const models::PaddedBatch padded(lengths, batch, length, at::kCPU);
    ids = padded.ends_aligned(ids);
    reset = *padded.reset({});
  }
  const at::Device device = model.head_weight().device();
  const int64_t piece = std::max<int64_t>(kPromptPiece / batch, 1);
  at::Tensor h;
  models::ModelState state;
  for (int64_t first = 0; first < length; first += piece) {
    const int64_t count = std::min(piece, length - first);
    const at::Tensor begins = reset.narrow(1, first, count);
    std::optional<at::Tensor> begins_here;
    if (begins.any().item<bool>()) begins_here = begins.to(device);
    std::tie(h, state) = model.hidden(ids.narrow(1, first, count).to(device), state, begins_here);
  }
  return {model.logits(h.select(1, -1)), std::move(state)};  // the last token alone needs them
}

/// The same of prompts that go on from a state.
std::pair<at::Tensor, models::ModelState> read_on(models::LanguageModel& model,
                                                  const Prompts& prompts,
                                                  models::ModelState state) {
  const auto [ids, lengths] = padded_prompts(prompts);
  const int64_t batch = ids.size(0), length = ids.size(1);
  const at::Device device = model.head_weight().device();
  const int64_t piece = std::max<int64_t>(kPromptPiece / batch, 1);
  at::Tensor h, ends;  // (B,T,D) of a piece; (B,D) behind each prompt
  for (int64_t first = 0; first < length; first += piece) {
    const int64_t count = std::min(piece, length - first);
    const at::Tensor here = lengths.sub(first).clamp(0, count);
    std::tie(h, state) = model.hidden(ids.narrow(1, first, count).to(device), state, {}, here);
    const at::Tensor last = here.sub(1).clamp_min(0).to(device).view({batch, 1, 1});
    const at::Tensor now = h.gather(1, last.expand({batch, 1, h.size(2)})).squeeze(1);
    ends = ends.defined() ? at::where(here.gt(0).to(device).unsqueeze(1), now, ends) : now;
  }
  return {model.logits(ends), std::move(state)};
}

/// States of single prompts as they end, put together.
class LastStates {
 public:
  explicit LastStates(models::LanguageModel& model) : model_(model) {}

  /// The prompts `ended` stand in these rows of `state`, which is behind all but their last token, `tokens` (B,1) of all rows.
  void add(const std::vector<size_t>& ended, const std::vector<int64_t>& rows,
           const models::ModelState& state, const at::Tensor& tokens) {
    if (ended.empty()) return;
    const at::Device device = model_.head_weight().device();
    const at::Tensor index = at::tensor(rows, at::kLong);
    states_.push_back(
        model_.hidden(tokens.index_select(0, index).to(device), models::rows_of(state, index))
            .second);
    order_.insert(order_.end(), ended.begin(), ended.end());
  }
  models::ModelState all() const { return models::joined(states_, order_); }

 private:
  models::LanguageModel& model_;
  std::vector<models::ModelState> states_;
  std::vector<int64_t> order_;  ///< the prompt of each of their sequences
};

/// The same in each of `batch` rows, for samples of one prompt.
void repeat(int64_t batch, at::Tensor& logits, models::ModelState& state) {
  const auto rows = [batch](const at::Tensor& one) {
    std::vector<int64_t> sizes = one.sizes().vec();
    sizes.front() = batch;
    return one.expand(sizes).contiguous();
  };
  logits = rows(logits);
  for (auto& block : state)
    for (at::Tensor& tensor : block) tensor = rows(tensor);
}

/// Goes on without the prompts that have ended; the last row takes the place of each.
void drop_ended(const std::vector<bool>& ended, Decoder& decoder, std::vector<size_t>& rows,
                at::Tensor& tokens) {
  for (size_t row = rows.size(); row-- > 0;) {
    if (!ended[rows[row]]) continue;
    const auto last = static_cast<int64_t>(rows.size()) - 1, here = static_cast<int64_t>(row);
    decoder.drop(here);
    tokens[here].copy_(tokens[last]);
    tokens = tokens.narrow(0, 0, last);
    rows[row] = rows.back();
    rows.pop_back();
  }
}

int64_t argmax(at::ArrayRef<double> logits, size_t count) {
  return std::max_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(count)) -
         logits.begin();
}

void check_finite(at::ArrayRef<double> logits, size_t count) {
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

int64_t Sampler::draw(at::ArrayRef<double> logits) {
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
  const auto tell = [&](size_t, int64_t id) { on_token(id); };
  return generate_batch(model, {prompt}, options,
                        on_token ? std::function<void(size_t, int64_t)>(tell) : nullptr)[0];
}

std::vector<std::vector<int64_t>> generate_batch(
    models::LanguageModel& model, const std::vector<std::vector<int64_t>>& prompts,
    const SamplingOptions& options, const std::function<void(size_t, int64_t)>& on_token,
    models::ModelState* state) {
  check_prompts(prompts, model.options().vocab_size);
  if (state != nullptr && models::kind_named(model.options().kind).state_grows)
    throw Error(ExitCode::kConfig, "state: a model of kind " + model.options().kind +
                                       " keeps all that it has read and generates from whole "
                                       "prompts alone; give it the text so far");
  std::vector<Sampler> samplers;
  for (size_t i = 0; i < prompts.size(); ++i) {
    SamplingOptions own = options;
    own.seed += i;
    samplers.emplace_back(own);
  }
  Prompts generated(prompts.size());
  if (prompts.empty() || (options.max_new_tokens == 0 && state == nullptr)) return generated;
  const at::NoGradGuard no_grad;
  const nn::NoDropout no_dropout;

  const auto batch = static_cast<int64_t>(prompts.size());
  const bool goes_on = state != nullptr && !state->empty();
  const bool one_prompt = !goes_on && std::adjacent_find(prompts.begin(), prompts.end(),
                                                         std::not_equal_to<>()) == prompts.end();
  auto [logits, behind] =
      goes_on ? read_on(model, prompts, *state)
              : read_prompts(model, one_prompt ? Prompts{prompts.front()} : prompts);
  if (one_prompt && batch > 1) repeat(batch, logits, behind);
  if (options.max_new_tokens == 0) {
    *state = std::move(behind);
    return generated;
  }
  Decoder decoder(model, std::move(behind), {}, batch);
  LastStates last_states(model);
  const bool drops = model.head_weight().is_cpu();  // else rows that have ended go on, unheard
  at::Tensor tokens = at::zeros({batch, 1}, at::kLong);
  std::vector<size_t> rows(prompts.size());  // the prompt of each row of the decoder
  std::iota(rows.begin(), rows.end(), size_t{0});
  std::vector<bool> ended(prompts.size());
  for (int64_t count = 1;; ++count) {
    const at::Tensor known = logits.to(at::kCPU).to(at::kDouble).contiguous();  // waits
    const auto width = static_cast<size_t>(known.size(1));
    std::vector<size_t> ending;
    std::vector<int64_t> ending_rows;
    for (size_t row = 0; row < rows.size(); ++row) {
      const size_t i = rows[row];
      if (ended[i]) continue;
      const int64_t id = samplers[i].draw({known.const_data_ptr<double>() + row * width, width});
      generated[i].push_back(id);
      if (on_token) on_token(i, id);
      tokens.mutable_data_ptr<int64_t>()[row] = id;
      ended[i] = id == options.stop_token || count == options.max_new_tokens;
      if (!ended[i]) continue;
      ending.push_back(i);
      ending_rows.push_back(static_cast<int64_t>(row));
    }
    if (state != nullptr) last_states.add(ending, ending_rows, decoder.state(), tokens);
    if (std::find(ended.begin(), ended.end(), false) == ended.end()) break;
    if (drops) drop_ended(ended, decoder, rows, tokens);
    logits = decoder.next(tokens);
  }
  if (state != nullptr) *state = last_states.all();
  return generated;
}

}  // namespace xlstm::train
