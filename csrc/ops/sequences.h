#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace xlstm::ops {

/// First token of every sequence of a packed row of `time` tokens, and the end. Reads cu_seqlens (N+1), which waits for
/// its device. Throws c10::Error where it does not rise from 0 to T.
std::vector<int64_t> sequence_starts(std::string_view op, const at::Tensor& cu_seqlens,
                                     int64_t time);

/// cu_seqlens in int32, contiguous, for code that follows them wherever they lead, on a device that is not to be waited for:
/// the first becomes 0, the last T, others beyond the nearer of both, one that falls the one before. So nothing beyond T
/// is touched, and every token belongs to one sequence, which writes its results.
at::Tensor sequence_offsets(const at::Tensor& cu_seqlens, int64_t time);

}  // namespace xlstm::ops
