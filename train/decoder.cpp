#include "train/decoder.h"

#include <ATen/ops/empty.h>
#include <c10/util/Logging.h>

#include <exception>
#include <utility>

#include "csrc/nn/layers.h"

namespace xlstm::train {
namespace {

constexpr int64_t kTokensBeforeRecording = 8;  // short answers are not worth it

bool same_sizes(const models::ModelState& a, const models::ModelState& b) {
  for (size_t block = 0; block < a.size(); ++block) {
    if (a[block].size() != b[block].size()) return false;
    for (size_t i = 0; i < a[block].size(); ++i)
      if (a[block][i].sizes() != b[block][i].sizes()) return false;
  }
  return true;
}

}  // namespace

Decoder::Decoder(models::LanguageModel& model, models::ModelState state,
                 std::optional<bool> lazy_fold, int64_t sequences)
    : model_(model),
      state_(std::move(state)),
      lazy_fold_(lazy_fold),
      ids_(at::empty({sequences, 1},
                     model.head_weight().options().dtype(at::kLong).requires_grad(false))),
      may_record_(ids_.is_cuda() && StepGraph::available()) {}

void Decoder::work() {
  const nn::InPlaceStateGuard in_place(lazy_fold_);
  auto [logits, next] = model_.forward(ids_, state_);
  logits_ = logits.squeeze(1);
  // Empty before, or with its first ring of tokens (mLSTM), or one that grows (attention).
  if (tokens_ == 0 || !same_sizes(state_, next)) {
    may_record_ = may_record_ && tokens_ == 0;
    state_ = std::move(next);
    return;
  }
  // From here on the state stays where it is: a replay reads and writes it there.
  for (size_t block = 0; block < state_.size(); ++block)
    for (size_t i = 0; i < state_[block].size(); ++i)
      if (!next[block][i].is_same(state_[block][i])) state_[block][i].copy_(next[block][i]);
}

void Decoder::record() {
  may_record_ = false;  // once
  try {
    graph_.record([this] { work(); });
  } catch (const std::exception& error) {
    LOG(INFO) << "decoding goes on without a CUDA graph: " << error.what();
  }
}

const at::Tensor& Decoder::next(const at::Tensor& tokens) {
  ids_.copy_(tokens);
  advance();
  return logits_;
}

void Decoder::drop(int64_t row) {
  const int64_t last = ids_.size(0) - 1;
  ids_ = ids_.narrow(0, 0, last);
  for (auto& block : state_)
    for (at::Tensor& tensor : block) {
      if (row != last) tensor[row].copy_(tensor[last]);
      tensor = tensor.narrow(0, 0, last);
    }
}

void Decoder::advance() {
  if (may_record_ && tokens_ == kTokensBeforeRecording) record();
  if (graph_.recorded()) {
    graph_.replay();
  } else {
    work();
  }
  ++tokens_;
}

}  // namespace xlstm::train
