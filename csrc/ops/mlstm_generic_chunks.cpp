#include "csrc/ops/mlstm_generic_chunks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "csrc/ops/mlstm_plan.h"

namespace xlstm::ops {
namespace {

/// Scores of a chunk take L^2 numbers, its state DQK DV: about equal, within bounds that keep products worth their start.
int64_t chunk_length(const MlstmArguments& a, const MlstmSizes& sizes) {
  constexpr int64_t kMin = 64, kMax = 256, kLimit = 1024;
  const double root = std::sqrt(static_cast<double>(sizes.dqk * sizes.dv));
  int64_t length = kMin;
  while (length < kMax && static_cast<double>(length) * 1.5 < root) length *= 2;
  if (a.chunk_size > 0) length = std::min(a.chunk_size, kLimit);
  return std::max<int64_t>(1, std::min(length, sizes.time));
}

/// Every row is one sequence without resets: all by arithmetic on the device.
MlstmChunks equal_chunks(const MlstmArguments& a, const MlstmSizes& sizes) {
  MlstmChunks chunks;
  const int64_t batch = sizes.batch, time = sizes.time, length = chunk_length(a, sizes);
  const int64_t steps = (time + length - 1) / length;
  const at::TensorOptions options = a.q.options().dtype(at::kLong);
  chunks.batch = batch;
  chunks.time = time;
  chunks.length = length;
  chunks.count = steps * batch;
  chunks.step_counts.assign(batch == 0 ? 0 : steps, batch);
  const at::Tensor row = at::arange(batch, options);
  const at::Tensor t =
      (at::arange(steps, options).unsqueeze(1) * length + at::arange(length, options)).unsqueeze(1);
  const at::Tensor token = row.unsqueeze(1) * time + t;  // (steps, B, L)
  chunks.tokens = at::where(t < time, token, 0).flatten();
  if (time % length != 0)
    chunks.padding = (t >= time).expand({steps, batch, length}).reshape({-1, 1, length});
  const at::Tensor all = at::arange(time, options);
  chunks.slots = ((at::floor_divide(all, length) * batch + row.unsqueeze(1)) * length +
                  at::remainder(all, length))
                     .flatten();
  chunks.previous = at::arange(chunks.count, options);
  if (!a.c0 && !a.n0 && !a.m0) chunks.fresh = chunks.previous < batch;
  return chunks;
}

/// A plan with one part per sequence, made on the host.
MlstmPlan host_plan(MlstmArguments a, const MlstmSizes& sizes) {
  a.chunk_size = chunk_length(a, sizes);
  if (a.reset) a.reset = a.reset->cpu();
  if (a.cu_seqlens) a.cu_seqlens = a.cu_seqlens->cpu();
  return plan_mlstm(a, sizes, /*num_threads=*/1);
}

/// The sequences by falling number of chunks.
std::vector<int64_t> longest_first(const MlstmPlan& plan) {
  std::vector<int64_t> order(plan.parts.size());
  std::iota(order.begin(), order.end(), 0);
  const auto size = [&plan](int64_t i) {
    return plan.parts[i].chunk_end - plan.parts[i].chunk_begin;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&size](int64_t i, int64_t j) { return size(i) > size(j); });
  return order;
}

MlstmChunks unequal_chunks(const MlstmArguments& a, const MlstmSizes& sizes) {
  const MlstmPlan plan = host_plan(a, sizes);
  const int64_t count = static_cast<int64_t>(plan.chunks.size());
  const int64_t length = std::max<int64_t>(1, plan.max_length);
  const std::vector<int64_t> order = longest_first(plan);
  MlstmChunks chunks;
  std::vector<int64_t> tokens(count * length, 0), slots(sizes.batch * sizes.time), previous;
  std::vector<uint8_t> padding(count * length, 1), fresh;
  for (int64_t step = 0, before = 0;; ++step) {  // before: row of the step's first previous state
    const int64_t first = static_cast<int64_t>(previous.size());
    for (size_t rank = 0; rank < order.size(); ++rank) {
      const cpu::MlstmPart& part = plan.parts[order[rank]];
      if (part.chunk_begin + step >= part.chunk_end) break;
      const cpu::MlstmChunk& chunk = plan.chunks[part.chunk_begin + step];
      for (int64_t i = 0; i < chunk.length; ++i) {
        const int64_t slot = static_cast<int64_t>(previous.size()) * length + i;
        tokens[slot] = chunk.batch * sizes.time + chunk.begin + i;
        slots[tokens[slot]] = slot;
        padding[slot] = 0;
      }
      previous.push_back(before + static_cast<int64_t>(rank));
      fresh.push_back(chunk.fresh ? 1 : 0);
    }
    const int64_t added = static_cast<int64_t>(previous.size()) - first;
    if (added == 0) break;
    chunks.step_counts.push_back(added);
    before = chunks.step_counts.front() + first;
  }
  const auto upload = [&a](const auto& values) { return at::tensor(values).to(a.q.device()); };
  chunks.batch = sizes.batch;
  chunks.time = sizes.time;
  chunks.length = length;
  chunks.count = count;
  chunks.order = upload(order);
  chunks.tokens = upload(tokens);
  chunks.slots = upload(slots);
  chunks.previous = upload(previous);
  chunks.padding = upload(padding).to(at::kBool).view({count, 1, length});
  chunks.fresh = upload(fresh).to(at::kBool);
  return chunks;
}

}  // namespace

at::Tensor MlstmChunks::gather(const at::Tensor& x, at::ScalarType type, double fill) const {
  const int64_t heads = x.size(2), width = x.dim() == 4 ? x.size(3) : 1;
  at::Tensor out = x.reshape({batch * time, heads, width})
                       .index_select(0, tokens)
                       .view({count, length, heads, width})
                       .transpose(1, 2)
                       .to(type)
                       .contiguous();
  if (padding.defined()) out.masked_fill_(padding.unsqueeze(-1), fill);
  return x.dim() == 4 ? out : out.squeeze(-1);
}

at::Tensor MlstmChunks::scatter(const at::Tensor& x, at::ScalarType type) const {
  const int64_t heads = x.size(1), width = x.dim() == 4 ? x.size(3) : 1;
  const at::Tensor rows =
      x.transpose(1, 2).to(type).reshape({count * length, heads, width}).index_select(0, slots);
  if (x.dim() == 4) return rows.view({batch, time, heads, width});
  return rows.view({batch, time, heads});
}

at::Tensor MlstmChunks::to_order(const at::Tensor& states) const {
  return order.defined() ? states.index_select(0, order) : states;
}

at::Tensor MlstmChunks::from_order(const at::Tensor& states) const {
  return order.defined() ? states.index_select(0, order.argsort()) : states;
}

MlstmChunks make_mlstm_chunks(const MlstmArguments& a, const MlstmSizes& sizes) {
  return a.reset || a.cu_seqlens ? unequal_chunks(a, sizes) : equal_chunks(a, sizes);
}

}  // namespace xlstm::ops
