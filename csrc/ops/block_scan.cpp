#include "csrc/ops/block_scan.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace xlstm::ops {
namespace {

using at::Tensor;

/// `count` tokens of zeros behind the last one.
Tensor padded(const Tensor& x, int64_t count) {
  if (count == 0) return x;
  std::vector<int64_t> pad(static_cast<size_t>(2 * (x.dim() - 1)), 0);
  pad.back() = count;
  return at::constant_pad_nd(x, pad);
}

/// For every token what stands at the next one; zero at the last.
Tensor of_next(const Tensor& x) { return padded(x.narrow(1, 1, x.size(1) - 1), 1); }

/// (B,T) -> (B,T,1,...) of `rank` dimensions.
Tensor with_rank(const Tensor& mask, int64_t rank) {
  std::vector<int64_t> sizes(static_cast<size_t>(rank), 1);
  sizes[0] = mask.size(0), sizes[1] = mask.size(1);
  return mask.view(sizes);
}

/// A walk over chunks of about sqrt(T) tokens, forwards or backwards; x, gate, cut (B,C,L,...).
class Walk {
 public:
  Walk(const Tensor& x, const Tensor& gate, const Tensor& cut, bool reverse)
      : h_(x),
        cut_(cut),
        weight_(cut.defined() ? gate.masked_fill(cut, 0) : gate.clone()),
        reverse_(reverse),
        chunks_(x.size(1)),
        length_(x.size(2)) {}

  /// h_ becomes what each chunk has from itself, weight_ the product of the gates from the chunk's entry to each token.
  void within_chunks() {
    for (int64_t i = 1; i < length_; ++i) {
      const int64_t from = place(i - 1, length_), to = place(i, length_);
      const Tensor weight = weight_.select(2, to), cut = cut_of(2, to);
      add_passed(h_.select(2, to), weight, h_.select(2, from), cut);
      weight.mul_(weight_.select(2, from));
      if (cut.defined()) weight.masked_fill_(cut, 0);
    }
  }

  void between_chunks() {
    if (chunks_ == 1) return;
    if (cut_.defined()) {  // from here on: whether there was a cut between the chunk's entry and the token
      cut_ = (reverse_ ? cut_.flip(2).cumsum(2).flip(2) : cut_.cumsum(2)) > 0;
    }
    const int64_t last = place(length_ - 1, length_);
    std::vector<Tensor> entering;  // those of all chunks but the first
    for (int64_t i = 1; i < chunks_; ++i) {
      const int64_t from = place(i - 1, chunks_);
      Tensor state = h_.select(1, from).select(1, last);
      if (i > 1) {
        state = state.clone();
        const Tensor cut = cut_.defined() ? cut_.select(1, from).select(1, last) : Tensor();
        add_passed(state, weight_.select(1, from).select(1, last), entering.back(), cut);
      }
      entering.push_back(state);
    }
    if (reverse_) std::reverse(entering.begin(), entering.end());
    const auto others = [&](const Tensor& t) {
      return t.defined() ? t.narrow(1, reverse_ ? 0 : 1, chunks_ - 1) : t;
    };
    add_passed(others(h_), others(weight_), at::stack(entering, 1).unsqueeze(2), others(cut_));
  }

 private:
  int64_t place(int64_t i, int64_t count) const { return reverse_ ? count - 1 - i : i; }
  Tensor cut_of(int64_t dim, int64_t i) const {
    return cut_.defined() ? cut_.select(dim, i) : Tensor();
  }

  Tensor h_, cut_, weight_;
  bool reverse_;
  int64_t chunks_, length_;
};

}  // namespace

void add_passed(const Tensor& to, const Tensor& keep, const Tensor& from, const Tensor& cut) {
  if (cut.defined()) {
    to.add_((keep * from).masked_fill_(cut, 0));
  } else {
    to.addcmul_(keep, from);
  }
}

Tensor reset_of_token(const Tensor& reset, int64_t t, int64_t rank) {
  if (!reset.defined()) return reset;
  std::vector<int64_t> sizes(static_cast<size_t>(rank), 1);
  sizes[0] = reset.size(0);
  return reset.select(1, t).reshape(sizes);
}

Tensor scan_block(const Tensor& x, const Tensor& keep, const Tensor& reset, bool reverse) {
  const int64_t time = x.size(1);
  if (time < 2) return x;
  const auto length = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(time))));
  const int64_t chunks = (time + length - 1) / length;
  const auto chunked = [&](const Tensor& t) {
    return padded(t, chunks * length - time).unflatten(1, {chunks, length});
  };
  const Tensor h = chunked(x), gate = chunked(reverse ? of_next(keep) : keep);
  Tensor cut;
  if (reset.defined()) cut = with_rank(reverse ? of_next(reset) : reset, x.dim());
  Walk walk(h, gate, cut.defined() ? chunked(cut) : cut, reverse);
  walk.within_chunks();
  walk.between_chunks();
  return h.flatten(1, 2).narrow(1, 0, time);
}

}  // namespace xlstm::ops
