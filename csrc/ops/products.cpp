#include "csrc/ops/products.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

namespace xlstm::ops {

namespace {

bool is_half(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

}  // namespace

at::Tensor full_factor(const at::Tensor& x) {
  return is_half(x) && !x.is_cuda() ? x.to(at::kFloat) : x;
}

at::Tensor full_product(const at::Tensor& left, const at::Tensor& right) {
  const at::Tensor a = full_factor(left), b = full_factor(right);
  const bool half = is_half(a);  // only a GPU's products have sums of another type
  if (a.dim() == 2) return half ? at::mm(a, b, at::kFloat) : at::mm(a, b);
  return half ? at::bmm(a, b, at::kFloat) : at::bmm(a, b);
}

int64_t product_chunks(int64_t terms, int64_t batch, int64_t rows, int64_t columns) {
  constexpr int64_t kTiles = 256, kTile = 128, kFewestTerms = 512;
  const int64_t tiles = batch * ((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
  int64_t chunks = 1;
  while (chunks * tiles < kTiles && terms % (2 * chunks) == 0 &&
         terms / (2 * chunks) >= kFewestTerms)
    chunks *= 2;
  return chunks;
}

}  // namespace xlstm::ops
