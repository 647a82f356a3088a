// A row is read once and kept in registers; so is one that is still to be added up, which is left in memory for the
// stream's next addition and for the gradients.
#include "cuda/norm/headwise_norm.cuh"

namespace xlstm::cuda {
namespace {

struct ForwardLaunch {
  NormLaunch norm;
  HeadwiseNormForward call;
  bool y_vector = false, term_vector[2] = {false, false};
};

template <int kThreads, bool kWide>
class ForwardBlock : public NormBlock<kThreads, kWide> {
  using Base = NormBlock<kThreads, kWide>;

 public:
  DEVICE_FUNCTION ForwardBlock(const ForwardLaunch& launch, typename Base::Shared& shared)
      : Base(launch.norm, shared), f(launch), call(launch.call) {}

  DEVICE_FUNCTION void run() {
    for (int64_t row = this->first + this->thread / this->l.group;
         row - this->thread / this->l.group < this->end; row += this->groups) {
      float x[8];
      if (call.terms[0].rows.data != nullptr) {
        add_terms(row, x);
      } else {
        this->keep(row, x);
      }
      const auto [mean, rstd] = this->statistics(row, x);
      for (int piece = 0; piece < (kWide ? this->pieces : 1); ++piece) {
        if (row >= this->end || this->width(piece) <= 0) continue;
        if constexpr (kWide) this->load_x(row, piece, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = (x[i] - mean) * rstd;
        this->before_gate(row, piece, x);
        gate(row, piece, x);
        store_eight(call.y, row * this->channels() + this->place(piece), this->in.dtype, f.y_vector,
                    this->width(piece), x);
      }
    }
  }

 private:
  /// What is kept is rounded as what is stored: the norm of the sum, not of something more exact. A wide row is read again
  /// by the threads that wrote it.
  DEVICE_FUNCTION void add_terms(int64_t row, float (&x)[8]) const {
    for (int piece = 0; piece < (kWide ? this->pieces : 1); ++piece) {
      if (row >= this->end || this->width(piece) <= 0) continue;
      float other[8];
      load_term(0, row, piece, x);
      load_term(1, row, piece, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = rounded(x[i] + other[i], this->in.dtype);
      store_eight(this->in.x.data, row * this->channels() + this->place(piece), this->in.dtype,
                  this->l.x_vector, this->width(piece), x);
    }
  }

  DEVICE_FUNCTION void load_term(int which, int64_t row, int piece, float (&x)[8]) const {
    const NormTerm& term = call.terms[which];
    load_eight(term.rows.data, row_offset(term.rows, row) + this->place(piece), term.dtype,
               f.term_vector[which], this->width(piece), x);
  }

  DEVICE_FUNCTION void gate(int64_t row, int piece, float (&v)[8]) const {
    if (this->in.gate.data == nullptr) return;
    float gate[8];
    this->load_row(this->in.gate, this->l.gate_vector, row, piece, gate);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float open = sigmoid(gate[i]);
      v[i] *= this->in.sigmoid_gate ? open : gate[i] * open;
    }
  }

  const ForwardLaunch& f;
  const HeadwiseNormForward& call;
};

template <class Block>
DEVICE_FUNCTION void run_block(const ForwardLaunch& l) {
  Block(l, *reinterpret_cast<typename Block::Shared*>(prim::dynamic_shared())).run();
}

KERNEL_FUNCTION(kNormFew, 4)
headwise_norm_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_block<ForwardBlock<kNormFew, false>>(l);
}

template <bool kWide>
KERNEL_FUNCTION(kNormMany, 2)
headwise_norm_wide_rows(const GRID_CONSTANT ForwardLaunch l) {
  run_block<ForwardBlock<kNormMany, kWide>>(l);
}

}  // namespace

void headwise_norm_forward(const HeadwiseNormForward& call, Stream stream) {
  constexpr int64_t kWantedBlocks = 8192;  // several rounds of a GPU's worth
  ForwardLaunch l;
  l.norm = norm_launch(call.in, kWantedBlocks / call.in.heads + 1);
  l.call = call;
  l.y_vector = norm_vector(call.y, call.in.dim, call.in.dtype);
  for (int i = 0; i < 2; ++i)
    l.term_vector[i] = norm_vector(call.terms[i].rows, call.in.dim, call.terms[i].dtype);
  const auto launch = [&](const char* name, auto kernel, int threads, size_t shared) {
    prim::launch(
        name, kernel,
        {static_cast<u32>(norm_strips(l.norm) * call.in.heads), static_cast<u32>(threads), shared},
        l, stream);
  };
  if (call.in.dim <= 8 * kNormFew)
    launch("headwise_norm_rows", headwise_norm_rows, kNormFew,
           sizeof(NormBlock<kNormFew, false>::Shared));
  else if (call.in.dim <= 8 * kNormMany)
    launch("headwise_norm_wide_rows", headwise_norm_wide_rows<false>, kNormMany,
           sizeof(NormBlock<kNormMany, false>::Shared));
  else
    launch("headwise_norm_wide_rows", headwise_norm_wide_rows<true>, kNormMany,
           sizeof(NormBlock<kNormMany, true>::Shared));
}

}  // namespace xlstm::cuda
