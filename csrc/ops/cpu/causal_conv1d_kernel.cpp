#include "csrc/ops/cpu/causal_conv1d_params.h"
#include "csrc/ops/cpu/causal_conv1d_window.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int64_t kForwardChannels = 512, kBackwardChannels = 128;  // one task's share

template <class A>
inline Vec<A> activate(const Vec<A>& v, bool silu) {
  return silu ? v * sigmoid(v) : v;
}

template <class T>
void copy_row(const T* from, T* to, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) to[c] = from ? from[c] : T(0);
}

template <class T>
void final_state(const CausalConv1dParams& p, int64_t index) {
  const Sequence<T> sequence(p, index);
  const int64_t rows = p.width - 1, first = sequence.length() - rows;
  for (int64_t k = 0; k < rows; ++k) {
    const T* row = sequence.kept(first + k) ? sequence.input(first + k) : nullptr;
    copy_row(row, static_cast<T*>(p.state) + sequence.state_row(k), p.channels);
  }
}

template <class T, int W>
void forward(const CausalConv1dParams& p) {
  using A = Acc<T>;
  const int64_t chunks = ceil_div(p.channels, kForwardChannels);
  const int64_t work = kConvItemRows * smaller(p.channels, kForwardChannels);
  at::parallel_for(0, p.item_count * chunks, larger(1, 16384 / larger(1, work)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t task = begin; task < end; ++task) {
                       const ConvItem& item = p.items[task / chunks];
                       const Sequence<T> sequence(p, item.sequence);
                       const int64_t c0 = task % chunks * kForwardChannels;
                       T* y = static_cast<T*>(p.y) + sequence.packed(0);
                       convolve<T, W>(p, sequence, item.begin, item.end, c0,
                                      smaller(p.channels, c0 + kForwardChannels),
                                      [&](int64_t t, int64_t c, int64_t n, const Vec<A>& v) {
                                        store(y + t * p.channels + c, activate(v, p.silu), n);
                                      });
                     }
                   });
  at::parallel_for(0, p.sequence_count, larger(1, 65536 / larger(1, p.channels * W)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t index = begin; index < end; ++index) final_state<T>(p, index);
                   });
}

// The backward pass of one item on channels c0 .. c1. d(t) is the gradient of the pre-activation at
// position t:
//   dx(s) = sum over j of d(s + j) * weight[W-1-j] where position s + j sees s, plus the final
//   state's gradient
//   dweight[W-1-j] = sum over t of d(t) * x(t - j)
template <class T, int W>
class BackwardItem {
 public:
  using A = Acc<T>;
  static constexpr int64_t kSize = kLanes<A>;
  static constexpr int64_t kMostRows = kConvItemRows + 2 * (kMostTaps - 1);

  BackwardItem(const CausalConv1dParams& p, const ConvItem& item, int64_t c0, int64_t c1, A* d)
      : p_(p), item_(item), sequence_(p, item.sequence), c0_(c0), c1_(c1), d_(d) {
    first_ = larger(item.begin, 0);
    last_ = smaller(item.end + W - 1, sequence_.length());
    for (int64_t t = first_; t < last_; ++t) taps_[t - first_] = sequence_.taps(t);
  }

  void run(A* sums) {
    if (p_.dy) preactivation_grads();
    int64_t s = item_.begin;
    while (s < item_.end) {
      if (p_.dy && whole_group(s)) {
        input_grad_group(s);
        s += kGroup;
      } else {
        input_grad(s++);
      }
    }
    if (p_.dy) weight_grads(sums);
  }

 private:
  A* d(int64_t t) const { return d_ + (t - first_) * kBackwardChannels - c0_; }

  void preactivation_grads() {
    if (p_.silu) {
      convolve<T, W>(p_, sequence_, first_, last_, c0_, c1_,
                     [&](int64_t t, int64_t c, int64_t n, const Vec<A>& v) {
                       store(d(t) + c, load(sequence_.dy(t) + c, n) * silu_slope(v, sigmoid(v)), n);
                     });
      return;
    }
    for (int64_t t = first_; t < last_; ++t)
      for (int64_t c = c0_; c < c1_; c += kSize) {
        const int64_t n = smaller(kSize, c1_ - c);
        store(d(t) + c, load(sequence_.dy(t) + c, n), n);
      }
  }

  // True where positions s .. s + kGroup are tokens seen by all W positions from them on, and
  // outside the final state.
  bool whole_group(int64_t s) const {
    if (s < 0 || s + kGroup > item_.end || s + kGroup + W - 1 > sequence_.length()) return false;
    for (int64_t t = s; t < s + kGroup + W - 1; ++t)
      if (taps_[t - first_] <= smaller(t - s, W - 1)) return false;
    return true;
  }

  void input_grad_group(int64_t s) const {
    const A* weight = static_cast<const A*>(p_.weight);
    T* dx = static_cast<T*>(p_.dx) + sequence_.packed(s);
    const bool in_state = p_.dstate && s + kGroup > sequence_.length() - (W - 1);
    for (int64_t c = c0_; c < c1_; c += kSize) {
      const int64_t n = smaller(kSize, c1_ - c);
      Vec<A> w[W], v[kGroup + W - 1];
      for (int j = 0; j < W; ++j) w[j] = load(weight + (W - 1 - j) * p_.channels + c, n);
      for (int j = 0; j < kGroup + W - 1; ++j) v[j] = load(d(s + j) + c, n);
      for (int i = 0; i < kGroup; ++i) {
        Vec<A> sum = in_state ? state_grad(s + i, c, n) : Vec<A>(A(0));
        for (int j = 0; j < W; ++j) sum = at::vec::fmadd(w[j], v[i + j], sum);
        store(dx + i * p_.channels + c, sum, n);
      }
    }
  }

  void input_grad(int64_t s) const {
    const A* weight = static_cast<const A*>(p_.weight);
    T* out = s >= 0 ? static_cast<T*>(p_.dx) + sequence_.packed(s)
                    : static_cast<T*>(p_.dstate0) + sequence_.state_row(W - 1 + s);
    for (int64_t c = c0_; c < c1_; c += kSize) {
      const int64_t n = smaller(kSize, c1_ - c);
      Vec<A> sum = state_grad(s, c, n);
      for (int64_t j = 0; p_.dy && j < W && s + j < last_; ++j)
        if (s + j >= 0 && taps_[s + j - first_] > j)
          sum = at::vec::fmadd(load(weight + (W - 1 - j) * p_.channels + c, n),
                               load(d(s + j) + c, n), sum);
      store(out + c, sum, n);
    }
  }

  Vec<A> state_grad(int64_t s, int64_t c, int64_t n) const {
    const int64_t k = s - (sequence_.length() - (W - 1));
    if (!p_.dstate || k < 0 || !sequence_.kept(s)) return Vec<A>(A(0));
    return load(static_cast<const T*>(p_.dstate) + sequence_.state_row(k) + c, n);
  }

  void weight_grads(A* sums) const {
    const int64_t end = smaller(item_.end, sequence_.length());
    for (int64_t c = c0_; c < c1_; c += kSize) {
      const int64_t n = smaller(kSize, c1_ - c);
      Vec<A> dw[W], db = load(sums + W * p_.channels + c, n);
      for (int j = 0; j < W; ++j) dw[j] = load(sums + j * p_.channels + c, n);
      for (int64_t t = first_; t < end; ++t) {
        const Vec<A> dt = load(d(t) + c, n);
        const int64_t skipped = W - taps_[t - first_];
        db = db + dt;
        if (skipped == 0) {
          for (int j = 0; j < W; ++j)
            dw[j] = at::vec::fmadd(dt, load(sequence_.input(t - W + 1 + j) + c, n), dw[j]);
        } else {
          for (int j = 0; j < W; ++j)
            if (j >= skipped)
              dw[j] = at::vec::fmadd(dt, load(sequence_.input(t - W + 1 + j) + c, n), dw[j]);
        }
      }
      store(sums + W * p_.channels + c, db, n);
      for (int j = 0; j < W; ++j) store(sums + j * p_.channels + c, dw[j], n);
    }
  }

  const CausalConv1dParams& p_;
  const ConvItem& item_;
  const Sequence<T> sequence_;
  int64_t c0_, c1_, first_, last_;
  A* d_;  // (positions first_ .. last_, kBackwardChannels)
  int64_t taps_[kMostRows];
};

template <class T, int W>
void backward(const CausalConv1dParams& p) {
  using A = Acc<T>;
  const int64_t chunks = ceil_div(p.channels, kBackwardChannels);
  const int64_t stride = (W + 1) * p.channels;
  A* partials = static_cast<A*>(p.partials);
  at::parallel_for(0, p.group_count * chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> d(BackwardItem<T, W>::kMostRows * kBackwardChannels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / chunks, c0 = task % chunks * kBackwardChannels;
      const int64_t c1 = smaller(p.channels, c0 + kBackwardChannels);
      A* sums = partials + group * stride;
      for (int j = 0; j <= W; ++j)
        for (int64_t c = c0; c < c1; ++c) sums[j * p.channels + c] = A(0);
      const int64_t last = smaller(p.item_count, (group + 1) * p.group_items);
      for (int64_t i = group * p.group_items; i < last; ++i)
        BackwardItem<T, W>(p, p.items[i], c0, c1, d.get()).run(sums);
    }
  });
  sum_partials(partials, p.group_count, stride, W * p.channels, static_cast<A*>(p.dweight));
  if (p.dbias)
    sum_partials(partials + W * p.channels, p.group_count, stride, p.channels,
                 static_cast<A*>(p.dbias));
}

template <class T>
void step(const CausalConv1dStepParams& p) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  at::parallel_for(
      0, p.batch, larger(1, 16384 / larger(1, p.channels)), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const T* x = p.x.row<T>(b);
          T* state = static_cast<T*>(p.state) + b * p.state_batch_stride;
          T* y = static_cast<T*>(p.y) + b * p.channels;
          for (int64_t c = 0; c < p.channels; c += kLanes<A>) {
            const int64_t n = smaller(kLanes<A>, p.channels - c);
            const Vec<A> newest = load(x + c, n);
            Vec<A> sum = bias ? load(bias + c, n) : Vec<A>(A(0));
            for (int64_t j = 0; j < p.width - 1; ++j) {
              T* row = state + j * p.state_row_stride + c;
              sum = at::vec::fmadd(load(weight + j * p.channels + c, n), load(row, n), sum);
              store(row, j + 2 < p.width ? load(row + p.state_row_stride, n) : newest, n);
            }
            sum = at::vec::fmadd(load(weight + (p.width - 1) * p.channels + c, n), newest, sum);
            store(y + c, activate(sum, p.silu), n);
          }
        }
      });
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& p) {
  visit_dtype(p.dtype, [&](auto zero) {
    visit_width(p.width, [&](auto width) { forward<decltype(zero), decltype(width)::value>(p); });
  });
}

void causal_conv1d_backward(const CausalConv1dParams& p) {
  visit_dtype(p.dtype, [&](auto zero) {
    visit_width(p.width, [&](auto width) { backward<decltype(zero), decltype(width)::value>(p); });
  });
}

void causal_conv1d_step(const CausalConv1dStepParams& p) {
  visit_dtype(p.dtype, [&](auto zero) { step<decltype(zero)>(p); });
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
