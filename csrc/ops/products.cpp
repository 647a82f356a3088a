#include "csrc/ops/products.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

namespace xlstm::ops {

at::Tensor full_product(const at::Tensor& a, const at::Tensor& b) {
  const bool half = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  if (half && !a.is_cuda()) return full_product(a.to(at::kFloat), b.to(at::kFloat));
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
