#pragma once
// What both directions of the head-wise norm do alike. A block owns one head and a strip of rows, a group of its threads a
// row at a time; a thread holds pieces of four numbers of it. All that a row needs is loaded before the first number is used:
// memory's bandwidth asks for many bytes under way, a single row for one latency in place of several.
#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/norm/headwise_norm.h"
#include "cuda/numbers.cuh"
#include "cuda/prim/launch.h"
#include "cuda/rows.cuh"

namespace xlstm::cuda {

constexpr int kNormThreads = 256, kNormMost = 512;  ///< of a block: as a rule, for the widest rows

struct NormLaunch {
  HeadwiseNormInputs in;
  int32_t pieces = 1;      ///< of a thread; compiled in
  int32_t group_bits = 0;  ///< 2^so many threads share a row
  int32_t threads = kNormThreads;
  float one_by_dim = 1;
  int64_t strip = 1;       ///< rows of a block
  bool vector = false;     ///< all pieces of all tensors can be loaded and stored whole
  int32_t inner_rows = 1;  ///< if so: of every view of rows
  bool is_wide = false;    ///< rows are read again from memory, a tile of channels at a time

  PRIM_FUNCTION int32_t groups() const { return threads >> group_bits; }
};

constexpr int kPieceSize = 4;   ///< numbers of a piece: 16 bytes of float32, 8 of the other types
constexpr int kMostPieces = 3;  ///< of a thread

PRIM_FUNCTION constexpr int number_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

DEVICE_FUNCTION float sigmoid(float x) { return prim::rcp(1.0F + prim::ex2(x * -1.44269504F)); }

/// A piece as it lies in memory: what loads it waits for nothing.
struct RawPiece {
  u32 words[kPieceSize] = {};  ///< the first half where numbers have two bytes
};

/// `vector`: in one access; else number by number, of `count` numbers alone; the others are 0.
DEVICE_FUNCTION void load_piece(const void* data, Dtype dtype, bool vector, int count,
                                RawPiece& to) {
  if (dtype == Dtype::kFloat32) {
    const u32* const from = static_cast<const u32*>(data);
    const Bytes16 bytes = vector ? *reinterpret_cast<const Bytes16*>(from) : Bytes16{};
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i)
      to.words[i] = vector ? bytes.words[i] : i < count ? from[i] : 0;
  } else {
    const u16* const from = static_cast<const u16*>(data);
    if (vector) {
      const uint64_t bytes = *reinterpret_cast<const uint64_t*>(from);
      to.words[0] = static_cast<u32>(bytes), to.words[1] = static_cast<u32>(bytes >> 32);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i)
      if (i < count) to.words[i / 2] |= static_cast<u32>(from[i]) << 16 * (i % 2);
  }
}

DEVICE_FUNCTION void numbers_of(const RawPiece& piece, Dtype dtype, float (&x)[kPieceSize]) {
  const auto each = [&](auto number) {
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i) x[i] = number(i);
  };
  if (dtype == Dtype::kFloat32) {
    each([&](int i) { return prim::float_of(piece.words[i]); });
  } else if (dtype == Dtype::kBFloat16) {
    each([&](int i) { return prim::bf16_to_float(half_bits(piece.words, i)); });
  } else {
    each([&](int i) { return prim::f16_to_float(half_bits(piece.words, i)); });
  }
}

struct NormShared {
  float parts[2][kNormMost / 32][2];
};

/// kPieces: of a thread. kVector: launch.vector, known. kWide: launch.is_wide.
template <class T, int kPieces_, bool kVector, bool kWide_>
class NormBlock {
 public:
  static constexpr int kSize = kPieceSize, kPieces = kPieces_;
  static constexpr bool kWide = kWide_;
  static constexpr Dtype kDtype = kDtypeOf<T>;
  using Piece = RawPiece;
  using Pieces = Piece[kPieces];

  DEVICE_FUNCTION NormBlock(const NormLaunch& launch, NormShared& shared)
      : l(launch),
        in(launch.in),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        group(thread >> launch.group_bits),
        head(static_cast<int>(prim::block_idx().x) % launch.in.heads),
        strip(static_cast<int>(prim::block_idx().x) / launch.in.heads),
        first(strip * launch.strip),
        end(first + launch.strip < launch.in.rows ? first + launch.strip : launch.in.rows),
        width(kPieces * kSize << launch.group_bits),
        tiles(kWide ? divide_up(launch.in.dim, width) : 1) {}

 protected:
  template <class F>
  DEVICE_FUNCTION static void each_piece(F f) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) f(piece);
  }

  struct Statistics {
    float mean, rstd;
  };
  struct Row {
    int64_t index;
    bool exists;
    u32 outer, inner;  ///< where every view of rows is cut alike
    int64_t packed;    ///< place of the thread's first piece in packed rows
  };
  DEVICE_FUNCTION Row locate(int64_t index) const {
    Row row{index, index < end, 0, static_cast<u32>(index), index * channels() + place(0, 0)};
    if (kVector && index >= l.inner_rows) {
      const u32 rows = static_cast<u32>(l.inner_rows);
      row.outer = row.inner / rows, row.inner -= row.outer * rows;
    }
    return row;
  }
  DEVICE_FUNCTION int64_t offset(const RowView& rows, const Row& row) const {
    if constexpr (!kVector) return row_offset(rows, row.index);
    return row.outer * rows.outer_stride + row.inner * rows.inner_stride;
  }

  /// The first channel of a piece within the head.
  DEVICE_FUNCTION int channel(int tile, int piece) const {
    const int lane = thread & ((1 << l.group_bits) - 1);
    return tile * width + lane * kSize + step(piece);
  }
  /// From a thread's first piece.
  DEVICE_FUNCTION int step(int piece) const { return piece * kSize << l.group_bits; }
  /// How many channels it has; not positive past the end.
  DEVICE_FUNCTION int count(int tile, int piece) const { return in.dim - channel(tile, piece); }
  DEVICE_FUNCTION int64_t channels() const { return int64_t{in.heads} * in.dim; }
  /// Of a piece in parameters, skip, gate and packed rows.
  DEVICE_FUNCTION int64_t place(int tile, int piece) const {
    return int64_t{head} * in.dim + channel(tile, piece);
  }
  DEVICE_FUNCTION bool vector() const { return kVector || (kWide && l.vector); }

  /// Zeros where there is no such tensor, row or piece.
  DEVICE_FUNCTION void load_x(const Row& row, int tile, Pieces& out) const {
    load(in.x.data, row.exists, offset(in.x, row) + head * in.x_head + channel(tile, 0), kDtype,
         tile, out);
  }
  DEVICE_FUNCTION void load_row(const RowView& rows, const Row& row, int tile, Pieces& out,
                                Dtype dtype = kDtype) const {
    load(rows.data, row.exists, offset(rows, row) + place(tile, 0), dtype, tile, out);
  }
  DEVICE_FUNCTION void load_parameter(const NormParameter& parameter, int tile, Pieces& out) const {
    load(parameter.data, true, place(tile, 0), parameter.dtype, tile, out);
  }
  DEVICE_FUNCTION Piece load_parameter(const NormParameter& parameter, int tile, int piece) const {
    Piece out;
    if (parameter.data != nullptr && count(tile, piece) > 0)
      load_piece(static_cast<const char*>(parameter.data) +
                     place(tile, piece) * number_bytes(parameter.dtype),
                 parameter.dtype, vector(), count(tile, piece), out);
    return out;
  }
  /// `otherwise`: of an absent parameter, which then changes nothing.
  DEVICE_FUNCTION void parameter_numbers(const NormParameter& parameter, const Piece& piece,
                                         float otherwise, float (&x)[kSize]) const {
    numbers_of(piece, parameter.dtype, x);
    if (parameter.data != nullptr) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = otherwise;
  }

  /// Of packed rows of T.
  DEVICE_FUNCTION void store(void* data, const Row& row, int tile, int piece,
                             const float (&x)[kSize]) const {
    const int numbers = count(tile, piece);
    if (!row.exists || numbers <= 0) return;
    T* const first_piece = static_cast<T*>(data) + row.packed + tile * width;
    T* const to = first_piece + step(piece);
    if (vector()) {
      if constexpr (kDtype == Dtype::kFloat32) {
        Bytes16 bytes;
#pragma unroll
        for (int i = 0; i < kSize; ++i) bytes.words[i] = prim::bits_of(x[i]);
        *reinterpret_cast<Bytes16*>(to) = bytes;
      } else {
        *reinterpret_cast<uint64_t*>(to) =
            uint64_t{pack_halves(x[2], x[3], kDtype)} << 32 | pack_halves(x[0], x[1], kDtype);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i < numbers) from_float(to[i], x[i]);
  }

  /// Two passes: no cancellation for a mean far from zero. All threads of the block call it. x: where it is kept.
  DEVICE_FUNCTION Statistics statistics(const Row& row, const float (&x)[kPieces][kSize]) {
    float mean[1] = {}, squares[1] = {};
    if (!in.rms) {
      each_number(row, x, [&](float number) { mean[0] += number; });
      add_up(mean);
      mean[0] *= l.one_by_dim;
    }
    each_number(row, x,
                [&](float number) { squares[0] += (number - mean[0]) * (number - mean[0]); });
    add_up(squares);
    // Past the last row all is 0, whatever eps is.
    return {mean[0], row.exists ? 1.0F / sqrtf(squares[0] * l.one_by_dim + in.eps) : 0.0F};
  }

  /// Sums over the group, the same in all its threads. All threads of the group and of its warps call it.
  template <int kSums>
  DEVICE_FUNCTION void add_up(float (&sums)[kSums]) {
    static_assert(kSums <= 2);
    const u32 threads = 1U << l.group_bits;
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) {
      if (lanes >= threads) continue;
#pragma unroll
      for (float& sum : sums) sum += prim::float_of(prim::shfl_xor(prim::bits_of(sum), lanes));
    }
    if (threads <= 32) return;
    float(&parts)[kNormMost / 32][2] = s.parts[turn];
    if (thread % 32 == 0)
      for (int i = 0; i < kSums; ++i) parts[thread / 32][i] = sums[i];
    prim::named_sync(static_cast<u32>(group) + 1, threads);
    const int warps = 1 << (l.group_bits - 5);
    for (float& sum : sums) sum = 0;
    for (int warp = group * warps; warp < (group + 1) * warps; ++warp)
      for (int i = 0; i < kSums; ++i) sums[i] += parts[warp][i];
    turn ^= 1;  // the next sums' barrier comes before these places are written again
  }

  const NormLaunch& l;
  const HeadwiseNormInputs& in;
  NormShared& s;
  const int thread, group, head;
  const int64_t strip, first, end;
  const int width, tiles;  ///< channels of a tile; of a row

 private:
  /// data[begin..]: a thread's first piece.
  DEVICE_FUNCTION void load(const void* data, bool exists, int64_t begin, Dtype dtype, int tile,
                            Pieces& out) const {
#pragma unroll
    for (Piece& piece : out) piece = {};
    if (data == nullptr || !exists) return;
    const char* const from = static_cast<const char*>(data) + begin * number_bytes(dtype);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      if (count(tile, piece) > 0)
        load_piece(from + step(piece) * number_bytes(dtype), dtype, vector(), count(tile, piece),
                   out[piece]);
  }

  template <class F>
  DEVICE_FUNCTION void each_number(const Row& row, const float (&x)[kPieces][kSize], F f) const {
    Pieces loaded;
    for (int tile = 0; tile < tiles; ++tile) {
      if constexpr (kWide) load_x(row, tile, loaded);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if constexpr (kWide) {
          float again[kSize];
          numbers_of(loaded[piece], kDtype, again);
          each_of(again, count(tile, piece), f);
        } else {
          each_of(x[piece], count(tile, piece), f);
        }
      }
    }
  }
  template <class F>
  DEVICE_FUNCTION static void each_of(const float (&x)[kSize], int numbers, F f) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i < (kVector ? numbers > 0 ? kSize : 0 : numbers)) f(x[i]);
  }

  int turn = 0;
};

/// Whether pieces begin where whole accesses may, in every row and head.
inline bool norm_vector(const void* data, Dtype dtype, int64_t stride = 0, int64_t outer_stride = 0,
                        int64_t head = 0) {
  const auto bytes = static_cast<uintptr_t>(kPieceSize * number_bytes(dtype));
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride % kPieceSize == 0 &&
         outer_stride % kPieceSize == 0 && head % kPieceSize == 0;
}
inline bool norm_vector(const RowView& rows, Dtype dtype, int64_t head = 0) {
  return norm_vector(rows.data, dtype, rows.inner_stride, rows.outer_stride, head);
}

/// Cuts all views that are present as one of them is; whether that can be.
inline bool cut_alike(const std::vector<RowView*>& views, NormLaunch& l) {
  const int64_t rows = l.in.rows;
  if (rows > std::numeric_limits<int32_t>::max()) return false;
  int64_t inner_rows = std::max<int64_t>(rows, 1);  // one cut: row 0 alone is outermost
  for (const RowView* view : views)
    if (view->data != nullptr) inner_rows = std::min(inner_rows, view->inner_rows);
  l.inner_rows = static_cast<int32_t>(inner_rows);
  for (RowView* view : views) {
    if (view->data == nullptr || view->inner_rows == inner_rows) continue;
    if (view->inner_rows < rows) return false;
    view->outer_stride = inner_rows * view->inner_stride;
  }
  return true;
}

/// Pieces and groups that leave few threads without channels; of equals the most pieces, which need fewer sums over
/// threads. Where a GPU is not filled anyway: the most threads. `vector` and views: of what `in` does not have.
inline NormLaunch norm_launch(const HeadwiseNormInputs& in, bool vector,
                              std::vector<RowView*> views = {}) {
  NormLaunch l;
  l.in = in;
  l.one_by_dim = 1.0F / static_cast<float>(in.dim);
  l.vector = vector && in.dim % kPieceSize == 0 && norm_vector(in.x, in.dtype, in.x_head) &&
             norm_vector(in.skip, in.dtype) && norm_vector(in.gate, in.dtype);
  for (const NormParameter& p : {in.weight, in.bias, in.skip_weight})
    l.vector = l.vector && norm_vector(p.data, p.dtype);
  views.insert(views.end(), {&l.in.x, &l.in.skip, &l.in.gate});
  l.vector = l.vector && cut_alike(views, l);
  const int32_t pieces = divide_up(in.dim, kPieceSize);
  const auto bits_for = [&](int32_t each) {
    int32_t bits = 0;
    while (1 << bits < kNormMost && each << bits < pieces) ++bits;
    return bits;
  };
  l.pieces = kMostPieces, l.group_bits = bits_for(kMostPieces);
  l.is_wide = kMostPieces << l.group_bits < pieces;
  constexpr int64_t kFilling = 1024;  // threads of a multiprocessor
  const bool is_few = in.rows * in.heads * pieces <= in.num_multiprocessors * kFilling;
  for (int32_t each = kMostPieces - 1; each > 0 && l.vector && !l.is_wide; --each) {
    const int32_t bits = bits_for(each);
    if (each << bits < pieces) break;
    if (is_few || each << bits < l.pieces << l.group_bits) l.pieces = each, l.group_bits = bits;
  }
  l.threads = std::max(kNormThreads, 1 << l.group_bits);
  l.strip = l.groups();
  return l;
}
inline int64_t norm_strips(const NormLaunch& l) { return (l.in.rows + l.strip - 1) / l.strip; }

/// A kernel: Block is the direction's for some T, kPieces, kVector and kWide, built from `launch`.
template <class Block, class Launch>
DEVICE_FUNCTION void run_norm_block(const Launch& launch) {
  Block(launch, *reinterpret_cast<NormShared*>(prim::dynamic_shared())).run();
}

/// Launches the kernel that takes `l`, with shared memory for so many numbers behind NormShared. Of a direction's
/// Kernels<T>, wide, unaligned and vector<pieces> call their argument with their kernel's name and the kernel.
template <template <class> class Kernels, class Launch>
void launch_norm(const Launch& l, size_t numbers, Stream stream) {
  const NormLaunch& n = l.norm;
  const auto launch = [&](const char* name, auto kernel) {
    prim::launch(name, kernel,
                 {static_cast<u32>(norm_strips(n) * n.in.heads), static_cast<u32>(n.threads),
                  sizeof(NormShared) + numbers * sizeof(float)},
                 l, stream);
  };
  visit_dtype(n.in.dtype, [&](auto zero) {
    using Own = Kernels<decltype(zero)>;
    if (n.is_wide) return Own::wide(launch);
    if (!n.vector) return Own::unaligned(launch);
    if (n.pieces == 1) return Own::template vector<1>(launch);
    if (n.pieces == 2) return Own::template vector<2>(launch);
    Own::template vector<3>(launch);
  });
}

}  // namespace xlstm::cuda
