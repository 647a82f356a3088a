// A group of threads reads one row and keeps it in registers; so is one that is still to be added up, which is left in
// memory for the stream's next addition and for the gradients.
#include "cuda/norm/headwise_norm.cuh"

namespace xlstm::cuda {
namespace {

struct ForwardLaunch {
  NormLaunch norm;
  HeadwiseNormForward call;
};

template <class T, int kPieces, bool kVector, bool kWide>
class ForwardBlock : public NormBlock<T, kPieces, kVector, kWide> {
  using Base = NormBlock<T, kPieces, kVector, kWide>;
  using Base::kSize, Base::kDtype, Base::each_piece;
  using typename Base::Piece, typename Base::Pieces, typename Base::Row;

 public:
  DEVICE_FUNCTION ForwardBlock(const ForwardLaunch& launch, NormShared& shared)
      : Base(launch.norm, shared), call(launch.call) {}

  DEVICE_FUNCTION void run() {
    const Row row = this->locate(this->first + this->group);
    float x[kPieces][kSize];
    Beside beside;
    Pieces loaded[2];
    if (call.terms[0].rows.data != nullptr) {
      for (int tile = 0; tile < this->tiles; ++tile) {
        for (int i = 0; i < 2; ++i)
          this->load_row(call.terms[i].rows, row, tile, loaded[i], call.terms[i].dtype);
        if constexpr (!kWide) load_beside(row, 0, beside);
        each_piece([&](int p) { add_terms(row, tile, p, loaded[0][p], loaded[1][p], x[p]); });
      }
    } else if constexpr (!kWide) {
      this->load_x(row, 0, loaded[0]);
      load_beside(row, 0, beside);
      each_piece([&](int p) { numbers_of(loaded[0][p], kDtype, x[p]); });
    }
    const auto statistics = this->statistics(row, x);
    for (int tile = 0; tile < this->tiles; ++tile) {
      if constexpr (kWide) {
        this->load_x(row, tile, loaded[0]);
        each_piece([&](int p) { numbers_of(loaded[0][p], kDtype, x[p]); });
        load_beside(row, tile, beside);
      }
      if constexpr (!kParametersEarly) load_parameters(tile, beside);
      each_piece([&](int p) {
#pragma unroll
        for (float& number : x[p]) number = (number - statistics.mean) * statistics.rstd;
        finish(p, beside, x[p]);
        this->store(call.y, row, tile, p, x[p]);
      });
    }
  }

 private:
  struct Beside {
    Pieces skip, gate, weight, bias, skip_weight;
  };
  /// Parameters, which come from a cache where rows are many, wait in registers only where those are few.
  static constexpr bool kParametersEarly = kPieces == 1;

  DEVICE_FUNCTION void load_beside(const Row& row, int tile, Beside& to) const {
    this->load_row(this->in.skip, row, tile, to.skip);
    this->load_row(this->in.gate, row, tile, to.gate);
    if constexpr (kParametersEarly) load_parameters(tile, to);
  }
  DEVICE_FUNCTION void load_parameters(int tile, Beside& to) const {
    this->load_parameter(this->in.weight, tile, to.weight);
    this->load_parameter(this->in.bias, tile, to.bias);
    this->load_parameter(this->in.skip_weight, tile, to.skip_weight);
  }

  /// What is kept is rounded as what is stored: the norm of the sum, not of something more exact. A wide row is read again
  /// by the threads that wrote it.
  DEVICE_FUNCTION void add_terms(const Row& row, int tile, int p, const Piece& a, const Piece& b,
                                 float (&x)[kSize]) const {
    float other[kSize];
    numbers_of(a, call.terms[0].dtype, x);
    numbers_of(b, call.terms[1].dtype, other);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = rounded(x[i] + other[i], kDtype);
    this->store(this->in.x.data, row, tile, p, x);
  }

  /// What is normalised becomes the output.
  DEVICE_FUNCTION void finish(int p, const Beside& beside, float (&v)[kSize]) const {
    float a[kSize], b[kSize];
    this->parameter_numbers(this->in.weight, beside.weight[p], 1, a);
    this->parameter_numbers(this->in.bias, beside.bias[p], 0, b);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = v[i] * a[i] + b[i];
    if (this->in.skip.data != nullptr) {
      this->parameter_numbers(this->in.skip_weight, beside.skip_weight[p], 0, a);
      numbers_of(beside.skip[p], kDtype, b);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] += a[i] * b[i];
    }
    if (this->in.gate.data == nullptr) return;
    numbers_of(beside.gate[p], kDtype, a);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] *= sigmoid(a[i]) * (this->in.sigmoid_gate ? 1.0F : a[i]);
  }

  const HeadwiseNormForward& call;
};

template <class T, int kPieces>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_norm_block<ForwardBlock<T, kPieces, true, false>>(l);
}

template <class T>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_unaligned_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_norm_block<ForwardBlock<T, kMostPieces, false, false>>(l);
}

template <class T>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_wide_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_norm_block<ForwardBlock<T, kMostPieces, false, true>>(l);
}

template <class T>
struct ForwardKernels {
  template <class F>
  static void wide(const F& launch) {
    launch("headwise_norm_wide_rows", headwise_norm_wide_rows<T>);
  }
  template <class F>
  static void unaligned(const F& launch) {
    launch("headwise_norm_unaligned_rows", headwise_norm_unaligned_rows<T>);
  }
  template <int kPieces, class F>
  static void vector(const F& launch) {
    launch("headwise_norm_rows", headwise_norm_rows<T, kPieces>);
  }
};

}  // namespace

void headwise_norm_forward(const HeadwiseNormForward& call, Stream stream) {
  bool vector = norm_vector(call.y, call.in.dtype);
  for (const NormTerm& term : call.terms) vector = vector && norm_vector(term.rows, term.dtype);
  ForwardLaunch l{{}, call};
  l.norm = norm_launch(call.in, vector, {&l.call.terms[0].rows, &l.call.terms[1].rows});
  launch_norm<ForwardKernels>(l, 0, stream);
}

}  // namespace xlstm::cuda
