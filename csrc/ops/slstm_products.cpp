#include "csrc/ops/slstm_products.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cstdint>

#include "csrc/ops/products.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// The first token of every packed sequence gets y0 or zero. On the device, as cu_seqlens is.
void start_sequences(Tensor& before, const OptionalTensor& y0, const Tensor& cu_seqlens) {
  const int64_t count = cu_seqlens.size(0) - 1;
  if (count == 0) return;
  const Tensor ends = cu_seqlens.contiguous();
  const Tensor token = at::arange(before.size(1), ends.options());
  const Tensor sequence = at::searchsorted(ends, token, /*out_int32=*/true, /*right=*/true)
                              .sub_(1)
                              .clamp_(0, count - 1);
  const Tensor first = (ends.index_select(0, sequence) == token).view({1, -1, 1, 1});
  const Tensor start = y0 ? y0->index_select(0, sequence).to(before.scalar_type()).unsqueeze(0)
                          : at::zeros_like(before);
  before = at::where(first, start, before);
}

/// Copies between tensors of one dtype whose numbers lie in different orders; in pieces of 16 bytes where both have such.
void copy_in_pieces(const Tensor& to, const Tensor& from) {
  constexpr int64_t kBytes = 16;
  const auto has_pieces = [](const Tensor& x) {
    const int64_t numbers = kBytes / x.element_size();
    bool whole = x.dim() > 0 && x.size(-1) % numbers == 0 && x.stride(-1) == 1 &&
                 x.storage_offset() % numbers == 0 &&
                 reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kBytes == 0;
    for (int64_t i = 0; i < x.dim() - 1; ++i) whole = whole && x.stride(i) % numbers == 0;
    return whole;
  };
  if (has_pieces(to) && has_pieces(from)) {
    to.view(at::kComplexDouble).copy_(from.view(at::kComplexDouble));
  } else {
    to.copy_(from);
  }
}

/// Of (B,T,NH,DH): (NH,B*T,DH); a view of what slstm_previous_y made.
Tensor rows_by_head(const Tensor& x) {
  return x.permute({2, 0, 1, 3}).reshape({x.size(2), x.size(0) * x.size(1), x.size(3)});
}

}  // namespace

Tensor slstm_previous_y(const Tensor& y, const OptionalTensor& y0, const OptionalTensor& reset,
                        const OptionalTensor& cu_seqlens) {
  const int64_t time = y.size(1);
  Tensor before =
      at::empty({y.size(2), y.size(0), time, y.size(3)}, y.options()).permute({1, 2, 0, 3});
  if (time == 0) return before;
  copy_in_pieces(before.narrow(1, 1, time - 1), y.narrow(1, 0, time - 1));
  const Tensor first = before.select(1, 0);
  if (cu_seqlens) {
    first.zero_();
    start_sequences(before, y0, *cu_seqlens);
  } else if (y0) {
    first.copy_(*y0);
  } else {
    first.zero_();
  }
  if (reset) before.masked_fill_(reset->unsqueeze(-1).unsqueeze(-1), 0);
  return before;
}

Tensor slstm_recurrent_rows(const Tensor& r, at::ScalarType dtype) {
  return r.to(dtype).transpose(0, 1).reshape({r.size(1), 4 * r.size(2), r.size(3)});
}

Tensor slstm_preactivations(const SlstmBackwardArguments& a, const Tensor& previous_y) {
  const int64_t batch = a.y.size(0), time = a.y.size(1), heads = a.y.size(2), dh = a.y.size(3);
  const Tensor rows = slstm_recurrent_rows(a.r, a.y.scalar_type());
  const Tensor product =
      full_product(rows_by_head(previous_y), rows.transpose(1, 2));  // (NH, B*T, 4*DH)
  return product.view({heads, batch, time, 4, dh})
      .permute({1, 2, 3, 0, 4})
      .add_(*a.wx)
      .add_(a.b->to(product.scalar_type()));
}

std::pair<Tensor, Tensor> slstm_parameter_gradients(const Tensor& dwx, const Tensor& previous_y) {
  const int64_t heads = dwx.size(3), dh = dwx.size(4), rows = dwx.size(0) * dwx.size(1);
  const int64_t chunks = product_chunks(rows, heads, 4 * dh, dh), length = rows / chunks;
  const Tensor gates = at::empty({heads * chunks, length, 4 * dh}, dwx.options());
  copy_in_pieces(gates.view({heads, chunks, length, 4, dh}).permute({1, 2, 3, 0, 4}),
                 dwx.flatten(0, 1).view({chunks, length, 4, heads, dh}));
  const Tensor y = rows_by_head(previous_y).view({heads * chunks, length, dh});
  const Tensor sums =
      full_product(gates.transpose(1, 2), y).view({heads, chunks, 4, dh, dh}).sum(1);
  const Tensor dr = sums.transpose(0, 1).contiguous();
  return {dr, dwx.sum(at::IntArrayRef{0, 1}, false, dr.scalar_type())};
}

}  // namespace xlstm::ops
