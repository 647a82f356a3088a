#pragma once
// Which tokens belong to which chunk.
#include "cuda/mlstm/mlstm_params.h"
#include "cuda/numbers.cuh"

namespace xlstm::cuda {

struct SequenceRange {
  int32_t batch, begin, length;  ///< row, first token in the row, tokens
  int32_t first_slot, num_chunks;
};

/// Slots need no prefix sum over sequences: floor(cu_seqlens[s] / L) + s leaves room for every partial chunk before.
DEVICE_FUNCTION SequenceRange sequence_at(const Chunks& c, int32_t sequence) {
  if (c.cu_seqlens == nullptr) {
    const int32_t count = divide_up(c.time, c.length);
    return {sequence, 0, c.time, sequence * count, count};
  }
  const int32_t begin = c.cu_seqlens[sequence], length = c.cu_seqlens[sequence + 1] - begin;
  return {0, begin, length, begin / c.length + sequence, divide_up(length, c.length)};
}

struct SlotRange {
  int32_t index;  ///< of the sequence
  SequenceRange sequence;
  int32_t chunk;  ///< of the sequence
  bool used;
};

/// The chunk that a slot holds, if any.
DEVICE_FUNCTION SlotRange slot_at(const Chunks& c, int32_t slot) {
  int32_t low = 0,
          high = c.num_sequences;  // the last sequence in [low, high) with first_slot <= slot
  if (c.cu_seqlens == nullptr) {
    low = slot / divide_up(c.time, c.length);
    if (low >= c.num_sequences) return {0, {}, 0, false};
  } else {
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (c.cu_seqlens[middle] / c.length + middle <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
  }
  const SequenceRange sequence = sequence_at(c, low);
  const int32_t chunk = slot - sequence.first_slot;
  return {low, sequence, chunk, chunk < sequence.num_chunks};
}

/// The anchor at the start of a sequence's chunk, or -1. A sequence's first chunk needs none.
DEVICE_FUNCTION int32_t anchor_at(const Chunks& c, const SequenceRange& s, int32_t chunk) {
  const int32_t slot = s.first_slot + chunk;
  return chunk > 0 && slot % c.anchor == 0 ? slot / c.anchor : -1;
}

/// Chunks [begin, end) of segment `segment`.
struct SegmentRange {
  int32_t begin, end;
};
DEVICE_FUNCTION SegmentRange segment_at(const Chunks& c, const SequenceRange& s, int32_t segment) {
  return {static_cast<int32_t>(static_cast<int64_t>(s.num_chunks) * segment / c.segments),
          static_cast<int32_t>(static_cast<int64_t>(s.num_chunks) * (segment + 1) / c.segments)};
}

}  // namespace xlstm::cuda
