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
  using Base::kSize, Base::kDtype;
  using typename Base::Piece, typename Base::Row;

 public:
  DEVICE_FUNCTION ForwardBlock(const ForwardLaunch& launch, typename Base::Shared& shared)
      : Base(launch.norm, shared), call(launch.call) {}

  DEVICE_FUNCTION void run() {
    const Row row = this->locate(this->first + this->group);
    float x[kPieces][kSize];
    Beside beside[kPieces];
    if (call.terms[0].rows.data != nullptr) {
      Piece terms[2][kPieces];
      for (int tile = 0; tile < this->tiles; ++tile) {
        each_piece([&](int p) {
          for (int i = 0; i < 2; ++i)
            terms[i][p] = this->load_row(call.terms[i].rows, row, tile, p, call.terms[i].dtype);
        });
        if constexpr (!kWide) load_beside(row, 0, beside);
        each_piece([&](int p) { add_terms(row, tile, p, terms[0][p], terms[1][p], x[p]); });
      }
    } else if constexpr (!kWide) {
      Piece rows[kPieces];
      each_piece([&](int p) { rows[p] = this->load_x(row, 0, p); });
      load_beside(row, 0, beside);
      each_piece([&](int p) { numbers_of(rows[p], kDtype, x[p]); });
    }
    const auto statistics = this->statistics(row, x);
    for (int tile = 0; tile < this->tiles; ++tile) {
      if constexpr (kWide) {
        each_piece([&](int p) { numbers_of(this->load_x(row, tile, p), kDtype, x[p]); });
        load_beside(row, tile, beside);
      }
      each_piece([&](int p) {
#pragma unroll
        for (float& number : x[p]) number = (number - statistics.mean) * statistics.rstd;
        finish(tile, p, beside[p], x[p]);
        this->store(call.y, row, tile, p, x[p]);
      });
    }
  }

 private:
  struct Beside {
    Piece skip, gate, weight, bias, skip_weight;
  };
  /// Parameters, which come from a cache where rows are many, wait in registers only where those are few.
  static constexpr bool kParametersEarly = kPieces == 1;

  template <class F>
  DEVICE_FUNCTION static void each_piece(F f) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) f(piece);
  }

  DEVICE_FUNCTION void load_beside(const Row& row, int tile, Beside (&beside)[kPieces]) const {
    each_piece([&](int p) {
      beside[p].skip = this->load_row(this->in.skip, row, tile, p);
      beside[p].gate = this->load_row(this->in.gate, row, tile, p);
      if constexpr (kParametersEarly) load_parameters(tile, p, beside[p]);
    });
  }
  DEVICE_FUNCTION void load_parameters(int tile, int p, Beside& to) const {
    to.weight = this->load_parameter(this->in.weight, tile, p);
    to.bias = this->load_parameter(this->in.bias, tile, p);
    to.skip_weight = this->load_parameter(this->in.skip_weight, tile, p);
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
  DEVICE_FUNCTION void finish(int tile, int p, Beside& beside, float (&v)[kSize]) const {
    if constexpr (!kParametersEarly) load_parameters(tile, p, beside);
    float a[kSize], b[kSize];
    this->parameter_numbers(this->in.weight, beside.weight, 1, a);
    this->parameter_numbers(this->in.bias, beside.bias, 0, b);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = v[i] * a[i] + b[i];
    if (this->in.skip.data != nullptr) {
      this->parameter_numbers(this->in.skip_weight, beside.skip_weight, 0, a);
      numbers_of(beside.skip, kDtype, b);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] += a[i] * b[i];
    }
    if (this->in.gate.data == nullptr) return;
    numbers_of(beside.gate, kDtype, a);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] *= sigmoid(a[i]) * (this->in.sigmoid_gate ? 1.0F : a[i]);
  }

  const HeadwiseNormForward& call;
};

template <class Block>
DEVICE_FUNCTION void run_block(const ForwardLaunch& l) {
  Block(l, *reinterpret_cast<typename Block::Shared*>(prim::dynamic_shared())).run();
}

template <class T, int kPieces>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_block<ForwardBlock<T, kPieces, true, false>>(l);
}

template <class T>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_unaligned_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_block<ForwardBlock<T, kMostPieces<T>, false, false>>(l);
}

template <class T>
KERNEL_FUNCTION(kNormMost, 1)
headwise_norm_wide_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_block<ForwardBlock<T, kMostPieces<T>, false, true>>(l);
}

template <class T>
void launch_rows(const ForwardLaunch& l, Stream stream) {
  const auto launch = [&](const char* name, auto kernel) {
    prim::launch(
        name, kernel,
        {static_cast<u32>(norm_strips(l.norm) * l.norm.in.heads), static_cast<u32>(l.norm.threads),
         sizeof(typename NormBlock<T, 1, true, false>::Shared)},
        l, stream);
  };
  if (l.norm.is_wide) return launch("headwise_norm_wide_rows", headwise_norm_wide_rows<T>);
  if (!l.norm.vector)
    return launch("headwise_norm_unaligned_rows", headwise_norm_unaligned_rows<T>);
  if (l.norm.pieces == 1) return launch("headwise_norm_rows", headwise_norm_rows<T, 1>);
  if (l.norm.pieces == 2) return launch("headwise_norm_rows", headwise_norm_rows<T, 2>);
  if constexpr (kMostPieces<T> == 3) launch("headwise_norm_rows", headwise_norm_rows<T, 3>);
}

}  // namespace

void headwise_norm_forward(const HeadwiseNormForward& call, Stream stream) {
  const int32_t size = call.in.dtype == Dtype::kFloat32 ? kPieceSize<float> : kPieceSize<bf16>;
  bool vector = norm_vector(call.y, call.in.dtype, size);
  for (const NormTerm& term : call.terms)
    vector = vector && norm_vector(term.rows, term.dtype, size);
  ForwardLaunch l{{}, call};
  l.norm = norm_launch(call.in, vector, {&l.call.terms[0].rows, &l.call.terms[1].rows});
  switch (call.in.dtype) {
    case Dtype::kFloat32:
      return launch_rows<float>(l, stream);
    case Dtype::kBFloat16:
      return launch_rows<bf16>(l, stream);
    case Dtype::kFloat16:
      return launch_rows<f16>(l, stream);
  }
}

}  // namespace xlstm::cuda
