#include "csrc/ops/sequences.h"

#include <c10/util/Exception.h>

#include <tuple>

namespace xlstm::ops {

std::vector<int64_t> sequence_starts(std::string_view op, const at::Tensor& cu_seqlens,
                                     int64_t time) {
  const at::Tensor plain = cu_seqlens.to(at::kCPU, at::kLong).contiguous();
  const int64_t* const data = plain.const_data_ptr<int64_t>();
  const std::vector<int64_t> starts(data, data + plain.numel());
  TORCH_CHECK(starts.front() == 0 && starts.back() == time, op,
              ": cu_seqlens: expected to go from 0 to T = ", time, ", got ", starts.front(), " to ",
              starts.back());
  for (size_t i = 1; i < starts.size(); ++i)
    TORCH_CHECK(starts[i - 1] <= starts[i], op, ": cu_seqlens: expected no falling values, got ",
                starts[i - 1], " before ", starts[i]);
  return starts;
}

at::Tensor sequence_offsets(const at::Tensor& cu_seqlens, int64_t time) {
  const at::Tensor within = cu_seqlens.clamp(0, time).to(at::kInt).contiguous();
  within.select(0, 0).zero_();
  within.select(0, -1).fill_(time);
  return std::get<0>(within.cummax(0));
}

}  // namespace xlstm::ops
