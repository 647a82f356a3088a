#include "csrc/ops/mlstm_plan.h"

#include <algorithm>
#include <cmath>

#include "csrc/ops/sequences.h"

namespace xlstm::ops {
namespace {

// Scores are (chunk, chunk) tiles per thread: longer chunks than this would only cost memory and time.
constexpr int64_t kMaxChunk = 1024;
// Best at every head size from 64 to 1024. From 128 rows on MKL no longer packs its operands, and rows that lie a power
// of two apart then fight for the same cache lines: five times slower.
constexpr int64_t kAutomaticChunk = 64;
// States of one (sequence, head) that the backward pass holds at a time; above it, every square root of them are kept
// and the rest computed a second time.
constexpr int64_t kStateBytes = int64_t{64} << 20;
// Tokens of a part: below this the second pass over its keys costs more than the threads bring.
constexpr int64_t kMinPartChunks = 2;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t chunk_length(const MlstmArguments& a) {
  return a.chunk_size > 0 ? std::min(a.chunk_size, kMaxChunk) : kAutomaticChunk;
}

/// Appends the chunks of tokens [begin, end) of a batch row.
void add_chunks(MlstmPlan& plan, int64_t batch, int64_t begin, int64_t end, int64_t length,
                bool fresh_start, const bool* reset) {
  bool fresh = fresh_start;
  for (int64_t t = begin; t < end;) {
    fresh = fresh || (reset != nullptr && reset[t]);
    int64_t stop = std::min(end, t + length);
    if (reset != nullptr) stop = std::find(reset + t + 1, reset + stop, true) - reset;
    plan.chunks.push_back({batch, t, stop - t, fresh});
    plan.max_length = std::max(plan.max_length, stop - t);
    t = stop;
    fresh = false;
  }
}

/// Cuts chunks [begin, end) of a sequence into parts of about `most` chunks.
void add_parts(MlstmPlan& plan, int64_t sequence, int64_t begin, int64_t end, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, divide_up(end - begin, most));
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = begin + (end - begin) * i / parts,
                  last = begin + (end - begin) * (i + 1) / parts;
    plan.parts.push_back({sequence, first, last, i == 0, i + 1 == parts});
    plan.max_part_chunks = std::max(plan.max_part_chunks, last - first);
  }
}

}  // namespace

MlstmPlan plan_mlstm(const MlstmArguments& a, const MlstmSizes& sizes, int64_t num_threads) {
  MlstmPlan plan;
  const int64_t length = chunk_length(a);
  const bool fresh = !a.c0 && !a.n0 && !a.m0;
  const at::Tensor resets = a.reset ? a.reset->contiguous() : at::Tensor();
  const bool* reset = resets.defined() ? resets.const_data_ptr<bool>() : nullptr;
  std::vector<int64_t> ends;  // one past the last chunk of every sequence
  if (a.cu_seqlens) {
    const std::vector<int64_t> starts =
        sequence_starts("mlstm_chunkwise", *a.cu_seqlens, sizes.time);
    for (int64_t i = 0; i < sizes.num_sequences; ++i) {
      add_chunks(plan, 0, starts[i], starts[i + 1], length, fresh, reset);
      ends.push_back(static_cast<int64_t>(plan.chunks.size()));
    }
  } else {
    for (int64_t b = 0; b < sizes.batch; ++b) {
      add_chunks(plan, b, 0, sizes.time, length, fresh,
                 reset == nullptr ? nullptr : reset + b * sizes.time);
      ends.push_back(static_cast<int64_t>(plan.chunks.size()));
    }
  }
  // A thread's share of the chunks; a sequence longer than that per head is split.
  const int64_t total = static_cast<int64_t>(plan.chunks.size()) * sizes.num_heads;
  const int64_t most =
      std::max(kMinPartChunks, divide_up(total, std::max<int64_t>(num_threads, 1)));
  int64_t begin = 0;
  for (int64_t i = 0; i < sizes.num_sequences; ++i) {
    add_parts(plan, i, begin, ends[i], most);
    begin = ends[i];
  }
  const int64_t state_bytes =
      sizes.dqk * (sizes.dv + 1) * (a.q.scalar_type() == at::kDouble ? 8 : 4);
  const int64_t affordable = std::max<int64_t>(1, kStateBytes / state_bytes);
  plan.span_chunks = std::max<int64_t>(1, plan.max_part_chunks);
  if (plan.span_chunks > affordable)
    plan.span_chunks =
        static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(plan.max_part_chunks))));
  return plan;
}

}  // namespace xlstm::ops
