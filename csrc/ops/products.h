#pragma once
// Matrix products whose sums keep full precision, in ATen calls that read nothing back from the device.
#include <ATen/core/Tensor.h>

namespace xlstm::ops {

/// The product of two matrices, or batches of them, of one dtype; sum and result are float32 for bfloat16 and float16.
at::Tensor full_product(const at::Tensor& left, const at::Tensor& right);
/// x as full_product multiplies it: float32 where the device has no such products of bfloat16 and float16. For a factor of
/// several products, which would each convert it.
at::Tensor full_factor(const at::Tensor& x);

/// Into how many parts of equal length to split the `terms` that each number of a product is the sum of, to be computed
/// beside each other: `batch` products (rows,columns) of few numbers and many terms are too few tiles to fill a GPU with.
/// Depends on sizes alone.
int64_t product_chunks(int64_t terms, int64_t batch, int64_t rows, int64_t columns);

}  // namespace xlstm::ops
