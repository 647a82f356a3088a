#include "csrc/nn/long_convolution.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <map>
#include <vector>

namespace xlstm::nn {
namespace {

/// The least 2^a or 3 * 2^a that is not below `least`: sizes that every FFT library is fast at.
int64_t fft_size(int64_t least) {
  int64_t size = 4;
  while (size < least) size *= 2;
  return size / 4 * 3 >= least ? size / 4 * 3 : size;
}

at::Tensor one_document(const at::Tensor& u, const at::Tensor& kernel_in) {
  const int64_t length = u.size(-1), taps = std::min(kernel_in.size(-1), length);
  if (length == 0) return u;
  const at::Tensor kernel = kernel_in.narrow(-1, 0, taps);
  const int64_t size = fft_size(length + taps - 1);
  const at::Tensor product = at::fft_rfft(u, size) * at::fft_rfft(kernel, size);
  return at::fft_irfft(product, size).narrow(-1, 0, length);
}

struct Document {
  int64_t begin, length;  ///< begin counts in all rows one after the other
};

/// By the power of two that holds their length.
std::map<int64_t, std::vector<Document>> documents(const at::Tensor& reset) {
  const at::Tensor host = reset.to(at::kCPU).contiguous();
  const bool* starts = host.const_data_ptr<bool>();
  const int64_t batch = reset.size(0), length = reset.size(1);
  std::map<int64_t, std::vector<Document>> by_size;
  for (int64_t row = 0; row < batch; ++row) {
    int64_t begin = 0;
    for (int64_t t = 1; t <= length; ++t) {
      if (t < length && !starts[row * length + t]) continue;
      int64_t size = 1;
      while (size < t - begin) size *= 2;
      by_size[size].push_back({row * length + begin, t - begin});
      begin = t;
    }
  }
  return by_size;
}

/// Where the tokens of `some`, each padded to `size`, lie among all tokens: (documents * size); padding is `nowhere`.
at::Tensor places(const std::vector<Document>& some, int64_t size, int64_t nowhere) {
  const auto count = static_cast<int64_t>(some.size());
  at::Tensor index = at::full({count * size}, nowhere, at::kLong);
  int64_t* data = index.mutable_data_ptr<int64_t>();
  for (int64_t d = 0; d < count; ++d)
    for (int64_t t = 0; t < some[d].length; ++t) data[d * size + t] = some[d].begin + t;
  return index;
}

}  // namespace

at::Tensor long_convolution(const at::Tensor& u, const at::Tensor& kernel,
                            const std::optional<at::Tensor>& reset) {
  if (!reset || u.numel() == 0) return one_document(u, kernel);
  const at::Tensor tokens = u.movedim(-1, 1).flatten(0, 1);  // (B*T,...)
  const int64_t all = tokens.size(0);
  const at::Tensor padded = at::cat({tokens, at::zeros_like(tokens.narrow(0, 0, 1))});
  std::vector<at::Tensor> results, indices;
  for (const auto& [size, some] : documents(*reset)) {
    const at::Tensor index = places(some, size, all);
    const at::Tensor inputs = padded.index_select(0, index.to(u.device()))
                                  .unflatten(0, {static_cast<int64_t>(some.size()), size});
    results.push_back(one_document(inputs.movedim(1, -1), kernel).movedim(-1, 1).flatten(0, 1));
    indices.push_back(index);
  }
  const at::Tensor from = at::cat(indices);
  at::Tensor back = at::empty({all + 1}, at::kLong);
  back.index_put_({from}, at::arange(from.size(0)));
  return at::cat(results)
      .index_select(0, back.narrow(0, 0, all).to(u.device()))
      .unflatten(0, {u.size(0), u.size(-1)})
      .movedim(1, -1);
}

at::Tensor last_start(const at::Tensor& reset) {
  const at::Tensor index = at::arange(reset.size(1), reset.options().dtype(at::kLong));
  return (index * reset).amax(1);
}

at::Tensor without_past(const at::Tensor& x, const at::Tensor& first) {
  const at::Tensor gone = at::arange(x.size(1), first.options()) < first.unsqueeze(-1);
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()), 1);
  sizes[0] = x.size(0), sizes[1] = x.size(1);
  return x.masked_fill(gone.view(sizes), 0);
}

}  // namespace xlstm::nn
