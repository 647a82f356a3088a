// With x^ = norm(x), d = dy * act(gate) and g = d * weight: dx = rstd * (g - mean(g) - x^ * mean(g * x^)), the middle term
// for layer norm only, and what comes to x past the norm is added. The parameters' gradients are sums over rows: a block leaves those of its strip.
#include "cuda/column_sums.h"
#include "cuda/norm/headwise_norm.cuh"

namespace xlstm::cuda {
namespace {

enum { kWeight, kBias, kSkipWeight, kParameters };

struct BackwardLaunch {
  NormLaunch norm;
  HeadwiseNormBackward call;
  bool dy_vector = false, dsum_vector = false, dx_vector = false, dskip_vector = false,
       dgate_vector = false;
};

template <int kThreads, bool kWide>
struct BackwardShared {
  typename NormBlock<kThreads, kWide>::Shared norm;
  float columns[kWide ? 1 : kThreads * 8];  ///< [group][channel]
};

template <int kThreads, bool kWide>
class BackwardBlock : public NormBlock<kThreads, kWide> {
  using Base = NormBlock<kThreads, kWide>;

 public:
  using Shared = BackwardShared<kThreads, kWide>;

  DEVICE_FUNCTION BackwardBlock(const BackwardLaunch& launch, Shared& shared)
      : Base(launch.norm, shared.norm), b(launch), call(launch.call), columns(shared.columns) {
#pragma unroll
    for (int which = 0; which < kParameters; ++which)
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[which][i] = 0;
  }

  DEVICE_FUNCTION void run() {
    for (int64_t row = this->first + this->thread / this->l.group;
         row - this->thread / this->l.group < this->end; row += this->groups)
      do_row(row);
    if constexpr (!kWide) {
      leave_sums(kWeight, call.dweight);
      leave_sums(kBias, call.dbias);
      leave_sums(kSkipWeight, call.dskip_weight);
    }
  }

 private:
  DEVICE_FUNCTION void do_row(int64_t row) {
    float normed[8], d[8];
    this->keep(row, normed);
    const auto [mean, rstd] = this->statistics(row, normed);
    float sum_g = 0, sum_gx = 0;
    for (int piece = 0; piece < (kWide ? this->pieces : 1); ++piece) {
      if (row >= this->end || this->width(piece) <= 0) continue;
      normalise(row, piece, mean, rstd, normed);
      gradients<true>(row, piece, normed, d);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < this->width(piece)) sum_g += d[i], sum_gx += d[i] * normed[i];
    }
    this->add_up(sum_g, sum_gx);
    const float count = static_cast<float>(this->in.dim);
    const float mean_g = this->in.rms ? 0.0F : sum_g / count, mean_gx = sum_gx / count;
    for (int piece = 0; piece < (kWide ? this->pieces : 1); ++piece) {
      if (row >= this->end || this->width(piece) <= 0) continue;
      if constexpr (kWide) {
        normalise(row, piece, mean, rstd, normed);
        gradients<false>(row, piece, normed, d);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] = (d[i] - mean_g - normed[i] * mean_gx) * rstd;
      if (call.dsum.data != nullptr) {
        float past[8];
        this->load_row(call.dsum, b.dsum_vector, row, piece, past);
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] += past[i];
      }
      store(call.dx, b.dx_vector, row, piece, d);
    }
  }

  DEVICE_FUNCTION void normalise(int64_t row, int piece, float mean, float rstd,
                                 float (&x)[8]) const {
    if constexpr (kWide) this->load_x(row, piece, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = (x[i] - mean) * rstd;
  }

  DEVICE_FUNCTION void store(void* to, bool vector, int64_t row, int piece,
                             const float (&x)[8]) const {
    store_eight(to, row * this->channels() + this->place(piece), this->in.dtype, vector,
                this->width(piece), x);
  }

  /// d becomes the gradient of norm(x). kAll: those of the other inputs are done as well.
  template <bool kAll>
  DEVICE_FUNCTION void gradients(int64_t row, int piece, const float (&normed)[8], float (&d)[8]) {
    this->load_row(call.dy, b.dy_vector, row, piece, d);
    if (this->in.gate.data != nullptr) through_gate<kAll>(row, piece, normed, d);
    if constexpr (kAll) {
      if (this->in.skip.data != nullptr) through_skip(row, piece, d);
      if (this->in.bias.data != nullptr) add(kBias, row, piece, d);
    }
    if (this->in.weight.data == nullptr) return;
    float a[8];
    if constexpr (kAll) {
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = d[i] * normed[i];
      add(kWeight, row, piece, a);
    }
    this->load_parameter(this->in.weight, this->l.weight_vector, piece, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i] *= a[i];
  }

  template <bool kAll>
  DEVICE_FUNCTION void through_gate(int64_t row, int piece, const float (&normed)[8],
                                    float (&d)[8]) const {
    float gate[8], value[8];
    this->load_row(this->in.gate, this->l.gate_vector, row, piece, gate);
    if constexpr (kAll) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = normed[i];
      this->before_gate(row, piece, value);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float open = sigmoid(gate[i]), slope = open * (1.0F - open);
      if constexpr (kAll)
        value[i] *= d[i] * (this->in.sigmoid_gate ? slope : open + gate[i] * slope);
      d[i] *= this->in.sigmoid_gate ? open : gate[i] * open;
    }
    if constexpr (kAll) store(call.dgate, b.dgate_vector, row, piece, value);
  }

  DEVICE_FUNCTION void through_skip(int64_t row, int piece, const float (&d)[8]) {
    float a[8];
    this->load_row(this->in.skip, this->l.skip_vector, row, piece, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] *= d[i];
    add(kSkipWeight, row, piece, a);
    this->load_parameter(this->in.skip_weight, this->l.skip_weight_vector, piece, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] *= d[i];
    store(call.dskip, b.dskip_vector, row, piece, a);
  }

  /// To the sums over rows: in registers, or where this thread alone reads and writes them.
  DEVICE_FUNCTION void add(int which, int64_t row, int piece, const float (&x)[8]) {
    if constexpr (!kWide) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[which][i] += x[i];
    } else {
      float* to = partial(which, this->channel(piece));
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < this->width(piece)) to[i] = (row == this->first ? 0.0F : to[i]) + x[i];
    }
  }

  DEVICE_FUNCTION float* partial(int which, int channel) const {
    return call.partials + (this->strip * kParameters + which) * this->channels() +
           int64_t{this->head} * this->in.dim + channel;
  }

  DEVICE_FUNCTION void leave_sums(int which, const void* wanted) {
    if (wanted == nullptr) return;
    prim::sync_block();
#pragma unroll
    for (int i = 0; i < 8; ++i) columns[this->thread * 8 + i] = sums[which][i];
    prim::sync_block();
    for (int i = this->thread; i < this->in.dim; i += kThreads) {
      float sum = 0;
      for (int group = 0; group < this->groups; ++group)
        sum += columns[group * 8 * this->l.group + i];
      *partial(which, i) = sum;
    }
  }

  const BackwardLaunch& b;
  const HeadwiseNormBackward& call;
  float* const columns;
  float sums[kParameters][8];
};

template <class Block>
DEVICE_FUNCTION void run_block(const BackwardLaunch& l) {
  Block(l, *reinterpret_cast<typename Block::Shared*>(prim::dynamic_shared())).run();
}

KERNEL_FUNCTION(kNormFew, 2)
headwise_norm_gradients(const GRID_CONSTANT BackwardLaunch l) {
  run_block<BackwardBlock<kNormFew, false>>(l);
}

template <bool kWide>
KERNEL_FUNCTION(kNormMany, 1)
headwise_norm_wide_gradients(const GRID_CONSTANT BackwardLaunch l) {
  run_block<BackwardBlock<kNormMany, kWide>>(l);
}

/// Some rounds of a GPU's worth of blocks; the partial sums stay small beside the rows.
NormLaunch backward_launch(const HeadwiseNormInputs& in) {
  constexpr int64_t kWantedBlocks = 1024;
  return norm_launch(in, kWantedBlocks / in.heads + 1);
}

void add_parameters(const HeadwiseNormBackward& call, int64_t strips, Stream stream) {
  const int64_t channels = int64_t{call.in.heads} * call.in.dim;
  ColumnSums sums;
  sums.rows = call.partials, sums.count = strips, sums.pitch = kParameters * channels;
  const auto add = [&](int which, void* out, Dtype dtype) {
    if (out != nullptr) sums.add({which * channels, channels, out, 1, dtype});
  };
  add(kWeight, call.dweight, call.in.weight.dtype);
  add(kBias, call.dbias, call.in.bias.dtype);
  add(kSkipWeight, call.dskip_weight, call.in.skip_weight.dtype);
  if (sums.num_parts > 0) launch_column_sums(sums, stream);
}

}  // namespace

int64_t headwise_norm_partials(const HeadwiseNormInputs& in) {
  return norm_strips(backward_launch(in)) * kParameters * in.heads * in.dim;
}

void headwise_norm_backward(const HeadwiseNormBackward& call, Stream stream) {
  BackwardLaunch l;
  l.norm = backward_launch(call.in);
  l.call = call;
  const auto vector = [&](const void* data) {
    return norm_vector(data, call.in.dim, call.in.dtype);
  };
  l.dy_vector = norm_vector(call.dy, call.in.dim, call.in.dtype);
  l.dsum_vector = norm_vector(call.dsum, call.in.dim, call.in.dtype);
  l.dx_vector = vector(call.dx);
  l.dskip_vector = vector(call.dskip), l.dgate_vector = vector(call.dgate);
  const int64_t strips = norm_strips(l.norm);
  const auto launch = [&](const char* name, auto kernel, int threads, size_t shared) {
    prim::launch(name, kernel,
                 {static_cast<u32>(strips * call.in.heads), static_cast<u32>(threads), shared}, l,
                 stream);
  };
  if (call.in.dim <= 8 * kNormFew)
    launch("headwise_norm_gradients", headwise_norm_gradients, kNormFew,
           sizeof(BackwardShared<kNormFew, false>));
  else if (call.in.dim <= 8 * kNormMany)
    launch("headwise_norm_wide_gradients", headwise_norm_wide_gradients<false>, kNormMany,
           sizeof(BackwardShared<kNormMany, false>));
  else
    launch("headwise_norm_wide_gradients", headwise_norm_wide_gradients<true>, kNormMany,
           sizeof(BackwardShared<kNormMany, true>));
  add_parameters(call, strips, stream);
}

}  // namespace xlstm::cuda
