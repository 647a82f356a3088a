#include "csrc/ops/cpu/block_linear_params.h"
#include "csrc/ops/cpu/block_linear_small.h"
#include "csrc/ops/cpu/gemm.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int64_t kGemmRows = 256;  // rows of one GEMM tile

inline bool small(const BlockLinearParams& p) {
  return p.in <= kSmallBlock && p.out <= kSmallBlock;
}

// Calls f with the way to vectorise these small blocks.
template <class T, class F>
void with_small_blocks(const BlockLinearParams& p, const F& f) {
  constexpr int64_t kSize = kLanes<Acc<T>>;
  if (p.in == p.out && p.in == 2 && kSize >= 2) return f(RotatedBlocks<T, 2>(p));
  if (p.in == p.out && p.in == 4 && kSize >= 4) return f(RotatedBlocks<T, 4>(p));
  if (p.in == p.out && p.in == 8 && kSize >= 8) return f(RotatedBlocks<T, 8>(p));
  f(PaddedBlocks<T>(p));
}

template <class T>
void small_forward(const BlockLinearParams& p) {
  with_small_blocks<T>(p, [&](const auto& blocks) {
    const int64_t grain = larger(kTileRows, 65536 / larger(1, p.blocks * p.in * p.out));
    at::parallel_for(0, p.rows, grain,
                     [&](int64_t begin, int64_t end) { blocks.forward(begin, end); });
  });
}

template <class T>
void small_backward(const BlockLinearParams& p) {
  using A = Acc<T>;
  with_small_blocks<T>(p, [&](const auto& blocks) {
    A* partials = static_cast<A*>(p.partials);
    const int64_t size = blocks.sum_size(), outputs = p.blocks * p.out;
    at::parallel_for(0, p.block_count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        A* sums = partials + block * p.partial_size;
        for (int64_t i = 0; i < size + outputs; ++i) sums[i] = A(0);
        const int64_t first = block * p.block_rows;
        blocks.backward(first, smaller(p.rows, first + p.block_rows), sums, sums + size);
      }
    });
    if (p.dbias)
      sum_partials(partials + size, p.block_count, p.partial_size, outputs,
                   static_cast<A*>(p.dbias));
    const Scratch<A> total(size);
    sum_partials(partials, p.block_count, p.partial_size, size, total.get());
    blocks.unpack(total.get(), static_cast<A*>(p.dweight));
  });
}

template <class T>
void copy_in(const T* from, int64_t stride, int64_t rows, int64_t width, Acc<T>* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes<Acc<T>>) {
      const int64_t n = smaller(kLanes<Acc<T>>, width - c);
      store(to + r * width + c, load(from + r * stride + c, n), n);
    }
}

template <class T>
void copy_out(const Acc<T>* from, int64_t rows, int64_t width, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes<Acc<T>>) {
      const int64_t n = smaller(kLanes<Acc<T>>, width - c);
      store(to + r * stride + c, load(from + r * width + c, n), n);
    }
}

// y = x * op(weight) + bias for each block, with k inputs and n outputs per block; y is packed.
template <class T>
struct LargeMap {
  const BlockLinearParams& p;
  Rows x;
  int64_t k, n;
  Op op;
  const Acc<T>* bias;
  T* y;

  void run() const {
    const int64_t tiles = ceil_div(p.rows, kGemmRows);
    const int64_t tile_work = smaller(kGemmRows, p.rows) * k * n;
    const int64_t grain = larger(1, (int64_t(1) << 18) / larger(1, tile_work));
    at::parallel_for(0, p.blocks * tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run_tile(task / tiles, task % tiles);
    });
  }

  void run_tile(int64_t block, int64_t tile) const {
    using A = Acc<T>;
    const int64_t first = tile * kGemmRows, rows = smaller(kGemmRows, p.rows - first);
    const A* weight = static_cast<const A*>(p.weight) + block * k * n;
    const T* from = x.row<T>(first) + block * k;
    T* to = y + first * p.blocks * n + block * n;
    if constexpr (sizeof(T) == sizeof(A)) {
      product(rows, from, x.inner_stride, weight, block, to, p.blocks * n);
    } else {
      const Scratch<A> inputs(rows * k), outputs(rows * n);
      copy_in(from, x.inner_stride, rows, k, inputs.get());
      product(rows, inputs.get(), k, weight, block, outputs.get(), n);
      copy_out(outputs.get(), rows, n, to, p.blocks * n);
    }
  }

  void product(int64_t rows, const Acc<T>* a, int64_t lda, const Acc<T>* weight, int64_t block,
               Acc<T>* c, int64_t ldc) const {
    using A = Acc<T>;
    if (bias)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < n; ++j) c[r * ldc + j] = bias[block * n + j];
    gemm<A>(Op::kNone, op, rows, n, k, A(1), a, rows > 1 ? lda : k, weight, p.in,
            bias ? A(1) : A(0), c, ldc);
  }
};

// dweight of one block: dy^T x over all rows, in tiles of rows where they have to be converted.
template <class T>
void large_weight_grad(const BlockLinearParams& p, int64_t block) {
  using A = Acc<T>;
  A* dweight = static_cast<A*>(p.dweight) + block * p.in * p.out;
  const T* x = p.x.row<T>(0) + block * p.in;
  const T* dy = p.dy.row<T>(0) + block * p.out;
  const int64_t x_stride = p.rows > 1 ? p.x.inner_stride : p.in;
  const int64_t dy_stride = p.rows > 1 ? p.dy.inner_stride : p.out;
  if constexpr (sizeof(T) == sizeof(A)) {
    gemm<A>(Op::kTranspose, Op::kNone, p.out, p.in, p.rows, A(1), dy, dy_stride, x, x_stride, A(0),
            dweight, p.in);
  } else {
    for (int64_t i = 0; i < p.in * p.out; ++i) dweight[i] = A(0);
    const Scratch<A> x_tile(kGemmRows * p.in), dy_tile(kGemmRows * p.out);
    for (int64_t r = 0; r < p.rows; r += kGemmRows) {
      const int64_t rows = smaller(kGemmRows, p.rows - r);
      copy_in(x + r * x_stride, x_stride, rows, p.in, x_tile.get());
      copy_in(dy + r * dy_stride, dy_stride, rows, p.out, dy_tile.get());
      gemm<A>(Op::kTranspose, Op::kNone, p.out, p.in, rows, A(1), dy_tile.get(), p.out,
              x_tile.get(), p.in, A(1), dweight, p.in);
    }
  }
}

template <class T>
void large_bias_grad(const BlockLinearParams& p) {
  using A = Acc<T>;
  const int64_t width = p.blocks * p.out;
  A* partials = static_cast<A*>(p.partials);
  at::parallel_for(0, p.block_count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      A* sums = partials + block * p.partial_size;
      for (int64_t c = 0; c < width; ++c) sums[c] = A(0);
      const int64_t last = smaller(p.rows, (block + 1) * p.block_rows);
      for (int64_t r = block * p.block_rows; r < last; ++r)
        for (int64_t c = 0; c < width; c += kLanes<A>) {
          const int64_t n = smaller(kLanes<A>, width - c);
          store(sums + c, load(sums + c, n) + load(p.dy.row<T>(r) + c, n), n);
        }
    }
  });
  sum_partials(partials, p.block_count, p.partial_size, width, static_cast<A*>(p.dbias));
}

template <class T>
void large_backward(const BlockLinearParams& p) {
  LargeMap<T>{p, p.dy, p.out, p.in, Op::kNone, nullptr, static_cast<T*>(p.dx)}.run();
  if (p.blocks >= at::get_num_threads()) {
    at::parallel_for(0, p.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) large_weight_grad<T>(p, block);
    });
  } else {  // few blocks: the threads work inside the products
    for (int64_t block = 0; block < p.blocks; ++block) large_weight_grad<T>(p, block);
  }
  if (p.dbias) large_bias_grad<T>(p);
}

template <class T>
void forward(const BlockLinearParams& p) {
  if (small(p)) return small_forward<T>(p);
  LargeMap<T>{
      p, p.x, p.in, p.out, Op::kTranspose, static_cast<const Acc<T>*>(p.bias), static_cast<T*>(p.y)}
      .run();
}

}  // namespace

void block_linear(const BlockLinearParams& p) {
  visit_dtype(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
}

void block_linear_backward(const BlockLinearParams& p) {
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (small(p)) {
      small_backward<T>(p);
    } else {
      large_backward<T>(p);
    }
  });
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
