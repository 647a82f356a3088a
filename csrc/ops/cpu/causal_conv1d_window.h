#pragma once
// What a position of a sequence sees, and the convolution of a range of positions; shared by
// forward and backward.
#include "csrc/ops/cpu/causal_conv1d_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int kGroup = 4;  // positions that share loads of inputs and weights
constexpr int kMostTaps = 8;

/// One sequence of the batch as the kernels see it.
template <class T>
class Sequence {
 public:
  Sequence(const CausalConv1dParams& p, int64_t index)
      : p_(p), index_(index), length_(p.sequences[index].length) {
    const ConvSequence& s = p.sequences[index];
    const int64_t first = s.batch * p.time + s.start;
    x_ = static_cast<const T*>(p.x) + s.batch * p.x_batch_stride + s.start * p.x_time_stride;
    if (p.dy)
      dy_ = static_cast<const T*>(p.dy) + s.batch * p.dy_batch_stride + s.start * p.dy_time_stride;
    if (p.reset) reset_ = p.reset + first;
    first_ = first * p.channels;
  }

  int64_t length() const { return length_; }
  /// Elements from the start of a packed (B,T,C) tensor to position t.
  int64_t packed(int64_t t) const { return first_ + t * p_.channels; }
  /// Elements from the start of a packed (N,W-1,C) tensor to row k.
  int64_t state_row(int64_t k) const { return (index_ * (p_.width - 1) + k) * p_.channels; }
  const T* dy(int64_t t) const { return dy_ + t * p_.dy_time_stride; }

  /// The input at a position, from the start state below zero; null where there is none.
  const T* input(int64_t t) const {
    if (t >= 0) return x_ + t * p_.x_time_stride;
    return p_.state0 ? static_cast<const T*>(p_.state0) + state_row(p_.width - 1 + t) : nullptr;
  }

  /// The number of inputs, the own one included, that position t >= 0 sees: 1 .. W.
  int64_t taps(int64_t t) const {
    int64_t count = 1;
    while (count < p_.width && !(reset_ && t - count + 1 >= 0 && reset_[t - count + 1]) &&
           (t - count >= 0 || p_.state0))
      ++count;
    return count;
  }

  /// Whether the final state keeps the input of a position: no reset after it.
  bool kept(int64_t t) const {
    if (!reset_) return true;
    for (int64_t later = larger(t + 1, 0); later < length_; ++later)
      if (reset_[later]) return false;
    return true;
  }

 private:
  const CausalConv1dParams& p_;
  int64_t index_, length_, first_;
  const T *x_, *dy_ = nullptr;
  const bool* reset_ = nullptr;
};

/// bias + sum over the seen inputs of weight * input for positions begin .. end and channels c0 ..
/// c1, handed to emit(position, channel, lanes, value). The order of the additions is that of the
/// taps everywhere.
template <class T, int W, class Emit>
void convolve(const CausalConv1dParams& p, const Sequence<T>& sequence, int64_t begin, int64_t end,
              int64_t c0, int64_t c1, const Emit& emit) {
  using A = Acc<T>;
  constexpr int64_t kSize = kLanes<A>;
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  const auto start = [&](int64_t c, int64_t n) { return bias ? load(bias + c, n) : Vec<A>(A(0)); };
  const auto one_position = [&](int64_t t) {
    const int64_t skipped = W - sequence.taps(t);
    for (int64_t c = c0; c < c1; c += kSize) {
      const int64_t n = smaller(kSize, c1 - c);
      Vec<A> sum = start(c, n);
      for (int64_t j = skipped; j < W; ++j)
        sum = at::vec::fmadd(load(weight + j * p.channels + c, n),
                             load(sequence.input(t - W + 1 + j) + c, n), sum);
      emit(t, c, n, sum);
    }
  };
  const auto group = [&](int64_t t) {
    const T* inputs[kGroup + W - 1];
    for (int j = 0; j < kGroup + W - 1; ++j) inputs[j] = sequence.input(t - W + 1 + j);
    for (int64_t c = c0; c < c1; c += kSize) {
      const int64_t n = smaller(kSize, c1 - c);
      Vec<A> w[W], v[kGroup + W - 1];
      for (int j = 0; j < W; ++j) w[j] = load(weight + j * p.channels + c, n);
      for (int j = 0; j < kGroup + W - 1; ++j) v[j] = load(inputs[j] + c, n);
      const Vec<A> first = start(c, n);
      for (int i = 0; i < kGroup; ++i) {
        Vec<A> sum = first;
        for (int j = 0; j < W; ++j) sum = at::vec::fmadd(w[j], v[i + j], sum);
        emit(t + i, c, n, sum);
      }
    }
  };
  int64_t t = begin;
  while (t < end) {
    int whole = 0;
    while (whole < kGroup && t + whole < end && sequence.taps(t + whole) == W) ++whole;
    if (whole == kGroup) {
      group(t);
      t += kGroup;
    } else {
      one_position(t++);
    }
  }
}

/// Calls f with the width of the window as a type.
template <int W>
struct Width {
  static constexpr int value = W;
};
template <class F>
void visit_width(int64_t width, const F& f) {
  switch (width) {
    case 2:
      return f(Width<2>{});
    case 3:
      return f(Width<3>{});
    case 4:
      return f(Width<4>{});
    case 5:
      return f(Width<5>{});
    case 6:
      return f(Width<6>{});
    case 7:
      return f(Width<7>{});
    case kMostTaps:
      return f(Width<kMostTaps>{});
  }
}

}  // namespace
}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
