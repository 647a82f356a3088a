// With x^ = norm(x), d = dy * act(gate) and g = d * weight: dx = rstd * (g - mean(g) - x^ * mean(g * x^)), the middle term
// for layer norm only, and what comes to x past the norm is added. The parameters' gradients are sums over rows: a block
// leaves those of its strip, which fills its share of a multiprocessor and is as long as that allows.
#include "cuda/column_sums.h"
#include "cuda/norm/headwise_norm.cuh"

namespace xlstm::cuda {
namespace {

enum { kWeight, kSkipWeight, kBias, kParameters };
/// Those that a block keeps, and whose sums are in registers; a bias, which is rare, does without.
constexpr int kKept = kBias;

struct BackwardLaunch {
  NormLaunch norm;
  HeadwiseNormBackward call;
};

template <class T, int kPieces, bool kVector, bool kWide>
class BackwardBlock : public NormBlock<T, kPieces, kVector, kWide> {
  using Base = NormBlock<T, kPieces, kVector, kWide>;
  using Base::kSize, Base::kDtype, Base::each_piece;
  using typename Base::Pieces, typename Base::Row;

 public:
  /// Behind `shared`, not of wide rows: kept parameters in float32, (kKept, width), and the groups' sums of one parameter
  /// at a time, (groups, width).
  DEVICE_FUNCTION BackwardBlock(const BackwardLaunch& launch, NormShared& shared)
      : Base(launch.norm, shared),
        call(launch.call),
        kept(reinterpret_cast<float*>(&shared + 1)),
        columns(kept + kKept * this->width) {
    for (auto& parameter : sums)
      for (auto& piece : parameter)
        for (float& sum : piece) sum = 0;
  }

  DEVICE_FUNCTION void run() {
    if constexpr (!kWide) keep_parameters();
    for (int64_t row = this->first; row < this->end; row += this->l.groups())
      do_row(this->locate(row + this->group));
    if constexpr (!kWide) {
      leave_sums(kBias, call.dbias);  // before the others take its place
      leave_sums(kWeight, call.dweight);
      leave_sums(kSkipWeight, call.dskip_weight);
    }
  }

 private:
  /// What a thread reads of a row.
  struct Loaded {
    Pieces x, dy, gate, skip;
  };
  using Numbers = float[kSize];
  /// The further gradient waits in registers, too, where there are enough of them.
  static constexpr bool kPastEarly = kVector;

  DEVICE_FUNCTION void load_all(const Row& row, int tile, Loaded& to) const {
    this->load_x(row, tile, to.x);
    this->load_row(call.dy, row, tile, to.dy);
    this->load_row(this->in.gate, row, tile, to.gate);
    this->load_row(this->in.skip, row, tile, to.skip);
  }

  DEVICE_FUNCTION void do_row(const Row& row) {
    Loaded loaded;
    Pieces past;
    float normed[kPieces][kSize], d[kPieces][kSize];
    if constexpr (!kWide) {
      load_all(row, 0, loaded);
      if constexpr (kPastEarly) this->load_row(call.dsum, row, 0, past);
      each_piece([&](int p) { numbers_of(loaded.x[p], kDtype, normed[p]); });
    }
    const auto statistics = this->statistics(row, normed);
    const float mean = statistics.mean, rstd = statistics.rstd;
    const auto normalise = [&] {
      each_piece([&](int p) {
#pragma unroll
        for (float& x : normed[p]) x = (x - mean) * rstd;
      });
    };
    const auto load_again = [&](int tile) {
      load_all(row, tile, loaded);
      each_piece([&](int p) { numbers_of(loaded.x[p], kDtype, normed[p]); });
    };
    float means[2] = {};  // of g and g * x^
    for (int tile = 0; tile < this->tiles; ++tile) {
      if constexpr (kWide) load_again(tile);
      normalise();
      each_piece([&](int p) {
        gradients<true>(row, tile, p, loaded, normed[p], d[p]);
#pragma unroll
        for (int i = 0; i < kSize; ++i) means[0] += d[p][i], means[1] += d[p][i] * normed[p][i];
      });
    }
    this->add_up(means);
    const float mean_g = this->in.rms ? 0.0F : means[0] * this->l.one_by_dim;
    const float mean_gx = means[1] * this->l.one_by_dim;
    for (int tile = 0; tile < this->tiles; ++tile) {
      if constexpr (kWide) {
        load_again(tile);
        normalise();
        each_piece([&](int p) { gradients<false>(row, tile, p, loaded, normed[p], d[p]); });
      }
      if constexpr (!kPastEarly) this->load_row(call.dsum, row, tile, past);
      each_piece([&](int p) {
        Numbers dsum;
        numbers_of(past[p], kDtype, dsum);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          dsum[i] += (d[p][i] - mean_g - normed[p][i] * mean_gx) * rstd;
        this->store(call.dx, row, tile, p, dsum);
      });
    }
  }

  /// d becomes the gradient of norm(x). kAll: those of the other inputs are done as well.
  template <bool kAll>
  DEVICE_FUNCTION void gradients(const Row& row, int tile, int p, const Loaded& loaded,
                                 const Numbers& normed, Numbers& d) {
    Numbers a, weight, skip, skip_weight;
    numbers_of(loaded.dy[p], kDtype, d);
    numbers_of(loaded.skip[p], kDtype, skip);
    parameter(kWeight, tile, p, weight);
    if (kAll && this->in.skip.data != nullptr) parameter(kSkipWeight, tile, p, skip_weight);
    if (this->in.gate.data != nullptr) {
      Numbers gate, value;
      numbers_of(loaded.gate[p], kDtype, gate);
      if constexpr (kAll) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) value[i] = normed[i] * weight[i];
        if (this->in.bias.data != nullptr) {
          parameter(kBias, tile, p, a);
#pragma unroll
          for (int i = 0; i < kSize; ++i) value[i] += a[i];
        }
        if (this->in.skip.data != nullptr) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) value[i] += skip_weight[i] * skip[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float open = sigmoid(gate[i]), slope = open * (1.0F - open);
        if constexpr (kAll)
          value[i] *= d[i] * (this->in.sigmoid_gate ? slope : open + gate[i] * slope);
        d[i] *= this->in.sigmoid_gate ? open : gate[i] * open;
      }
      if constexpr (kAll) this->store(call.dgate, row, tile, p, value);
    }
    if constexpr (kAll) {
      add(kBias, row, tile, p, d);
      if (this->in.skip.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) a[i] = d[i] * skip[i], skip[i] = d[i] * skip_weight[i];
        add(kSkipWeight, row, tile, p, a);
        this->store(call.dskip, row, tile, p, skip);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) a[i] = d[i] * normed[i];
      add(kWeight, row, tile, p, a);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) d[i] *= weight[i];
  }

  /// A row needs no branches about types and absence where its block has looked once.
  DEVICE_FUNCTION void keep_parameters() const {
    for (int which = 0; which < kKept; ++which) {
      const NormParameter& from = parameters(which);
      for (int i = this->thread; i < this->width; i += this->l.threads)
        kept[which * this->width + i] =
            from.data == nullptr || i >= this->in.dim
                ? otherwise(which)
                : load_number(from.data, int64_t{this->head} * this->in.dim + i, from.dtype);
    }
    if (call.dbias != nullptr) each_piece([&](int p) { put_sums(p, Numbers{}); });
    prim::sync_block();
  }
  DEVICE_FUNCTION const NormParameter& parameters(int which) const {
    return which == kWeight ? this->in.weight
           : which == kBias ? this->in.bias
                            : this->in.skip_weight;
  }
  /// Of an absent parameter.
  DEVICE_FUNCTION static float otherwise(int which) { return which == kWeight ? 1.0F : 0.0F; }

  DEVICE_FUNCTION void parameter(int which, int tile, int p, Numbers& x) const {
    if (kWide || which >= kKept) {
      const NormParameter& from = parameters(which);
      this->parameter_numbers(from, this->load_parameter(from, tile, p), otherwise(which), x);
    } else {
      const float* const from = kept + which * this->width + this->channel(0, p);
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = from[i];
    }
  }

  /// To the sums over rows: in registers, or where this thread alone reads and writes them.
  DEVICE_FUNCTION void add(int which, const Row& row, int tile, int p, const Numbers& x) {
    if (kWide ? false : which < kKept) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[which][p][i] += x[i];
    } else if constexpr (!kWide) {
      if (call.dbias == nullptr) return;
      float* const to = sums_of(p);
#pragma unroll
      for (int i = 0; i < kSize; ++i) to[i] += x[i];
    } else {
      float* const to = partial(which, this->channel(tile, p));
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (i < this->count(tile, p)) to[i] = (row.index == this->first ? 0.0F : to[i]) + x[i];
    }
  }

  DEVICE_FUNCTION float* partial(int which, int channel) const {
    return call.partials + (this->strip * kParameters + which) * this->channels() +
           int64_t{this->head} * this->in.dim + channel;
  }

  /// This thread's place in columns.
  DEVICE_FUNCTION float* sums_of(int p) const {
    return columns + this->group * this->width + this->channel(0, p);
  }
  DEVICE_FUNCTION void put_sums(int p, const Numbers& x) const {
    float* const to = sums_of(p);
#pragma unroll
    for (int i = 0; i < kSize; ++i) to[i] = x[i];
  }

  DEVICE_FUNCTION void leave_sums(int which, const void* wanted) {
    if (wanted == nullptr) return;
    prim::sync_block();
    if (which < kKept) {
      each_piece([&](int p) { put_sums(p, sums[which][p]); });
      prim::sync_block();
    }
    for (int i = this->thread; i < this->in.dim; i += this->l.threads) {
      float sum = 0;
      for (int from = 0; from < this->l.groups(); ++from) sum += columns[from * this->width + i];
      *partial(which, i) = sum;
    }
  }

  const HeadwiseNormBackward& call;
  float *const kept, *const columns;
  float sums[kKept][kPieces][kSize];
};

template <class T, int kPieces>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_gradients(const GRID_CONSTANT BackwardLaunch l) {
  run_norm_block<BackwardBlock<T, kPieces, true, false>>(l);
}

template <class T>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_unaligned_gradients(const GRID_CONSTANT BackwardLaunch l) {
  run_norm_block<BackwardBlock<T, kMostPieces, false, false>>(l);
}

template <class T>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_wide_gradients(const GRID_CONSTANT BackwardLaunch l) {
  run_norm_block<BackwardBlock<T, kMostPieces, false, true>>(l);
}

template <class T>
struct BackwardKernels {
  template <class F>
  static void wide(const F& launch) {
    launch("headwise_norm_wide_gradients", headwise_norm_wide_gradients<T>);
  }
  template <class F>
  static void unaligned(const F& launch) {
    launch("headwise_norm_unaligned_gradients", headwise_norm_unaligned_gradients<T>);
  }
  template <int kPieces, class F>
  static void vector(const F& launch) {
    launch("headwise_norm_gradients", headwise_norm_gradients<T, kPieces>);
  }
};

/// One round of blocks that fills the GPU: the partial sums stay small beside the rows.
NormLaunch backward_launch(const HeadwiseNormInputs& in, bool vector,
                           const std::vector<RowView*>& views = {}) {
  NormLaunch l = norm_launch(in, vector, views);
  const int64_t threads = int64_t{in.num_multiprocessors} * kNormMost;
  const int64_t most = std::max<int64_t>(threads / l.threads / in.heads, 1);
  const int64_t steps = (in.rows + l.groups() - 1) / l.groups();
  l.strip = l.groups() * std::max<int64_t>((steps + most - 1) / most, 1);
  return l;
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
  int64_t strips = 0;
  for (const bool vector : {false, true})
    strips = std::max(strips, norm_strips(backward_launch(in, vector)));
  return strips * kParameters * in.heads * in.dim;
}

void headwise_norm_backward(const HeadwiseNormBackward& call, Stream stream) {
  bool vector = norm_vector(call.dy, call.in.dtype) && norm_vector(call.dsum, call.in.dtype);
  for (const void* data : {call.dx, call.dskip, call.dgate})
    vector = vector && norm_vector(data, call.in.dtype);
  BackwardLaunch l{{}, call};
  l.norm = backward_launch(call.in, vector, {&l.call.dy, &l.call.dsum});
  const size_t width = static_cast<size_t>(l.norm.pieces * kPieceSize) << l.norm.group_bits;
  const size_t numbers =
      l.norm.is_wide ? 0 : (kKept + static_cast<size_t>(l.norm.groups())) * width;
  launch_norm<BackwardKernels>(l, numbers, stream);
  add_parameters(call, norm_strips(l.norm), stream);
}

}  // namespace xlstm::cuda
