#include "csrc/nn/ssm.h"

#include <cmath>
#include <numbers>

#include "csrc/nn/long_convolution.h"

namespace xlstm::nn {
namespace {

constexpr double kLeastStep = 1e-3, kLargestStep = 1e-1;

at::Tensor complex_of(const at::Tensor& parts) { return at::view_as_complex(parts.contiguous()); }
at::Tensor twice_real(const at::Tensor& z) { return 2 * at::view_as_real(z).select(-1, 0); }

at::TensorOptions parameter_options(at::Device device) {
  return at::TensorOptions().dtype(at::kFloat).device(device);
}

/// About sqrt(length), and how many of these hold it.
std::pair<int64_t, int64_t> split(int64_t length) {
  const auto low = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(length))));
  return {low, (length + low - 1) / low};
}

}  // namespace

ShiftSsm::ShiftSsm(int64_t dim, int64_t state_size, at::Device device) : state_size_(state_size) {
  taps_ = register_parameter("taps", at::zeros({dim, state_size}, parameter_options(device)));
  skip_ = register_parameter("skip", at::zeros({dim}, parameter_options(device)));
  uniform_init_(taps_, 1 / std::sqrt(static_cast<double>(state_size)));
  normal_init_(skip_, 1);
}

std::pair<at::Tensor, at::Tensor> ShiftSsm::forward(const at::Tensor& x, const at::Tensor& window,
                                                    const std::optional<at::Tensor>& reset) const {
  const int64_t before = state_size_ - 1, length = x.size(1);
  const at::Tensor taps = taps_.to(x.scalar_type()), skipped = skip_.to(x.scalar_type()) * x;
  at::Tensor all =
      at::cat({window.defined() ? window.to(x.scalar_type())
                                : at::zeros({x.size(0), before, x.size(2)}, x.options()),
               x},
              1);
  std::optional<at::Tensor> starts;
  if (reset) starts = at::constant_pad_nd(*reset, {before, 0}, 0);
  const at::Tensor seen = reset ? without_past(all, last_start(*starts)) : all;
  const at::Tensor next = seen.narrow(1, length, before).clone();
  if (length == 1) return {(seen * taps.flip(1).t()).sum(1, true) + skipped, next};
  const at::Tensor y = long_convolution(all.transpose(1, 2), taps, starts);
  return {y.narrow(-1, before, length).transpose(1, 2) + skipped, next};
}

/// Powers of A up to T are products of two of about sqrt(T) powers each, so that nothing of size NH * N * T is ever held.
struct DiagonalSsm::Discrete {
  Discrete(const DiagonalSsm& ssm, at::ScalarType type) : complex_type(c10::toComplexType(type)) {
    // In float64: powers of a rounded A would turn away from the product of the steps.
    const at::Tensor step = at::exp(ssm.log_step_.to(at::kDouble)).unsqueeze(-1);
    const at::Tensor a =
        at::complex(-at::exp(ssm.log_decay_.to(at::kDouble)), ssm.frequency_.to(at::kDouble)) *
        (step / 2);
    log_a = at::log((1 + a) / (1 - a));
    b = rounded(complex_of(ssm.input_.to(at::kDouble)) * (step / (1 - a)));
    c = rounded(complex_of(ssm.output_.to(at::kDouble)));
  }
  at::Tensor rounded(const at::Tensor& z) const { return z.to(complex_type).unsqueeze(1); }

  /// A^first, A^{first+by}, ... (NH,1,count,N/2)
  at::Tensor powers(int64_t first, int64_t by, int64_t count) const {
    const at::Tensor exponents =
        at::arange(count, at::TensorOptions().dtype(at::kDouble).device(log_a.device())) * by +
        first;
    return rounded(at::exp(exponents.unsqueeze(-1) * log_a.unsqueeze(1)));
  }
  /// A^exponent (NH,1,N/2)
  at::Tensor power(int64_t exponent) const { return powers(exponent, 1, 1).squeeze(2); }

  /// 2 Re sum_n w_n A_n^l for l < length: w (...,NH,M,N/2) -> (...,NH,M,length)
  at::Tensor series(const at::Tensor& w, int64_t length) const {
    const auto [low, high] = split(length);
    const at::Tensor rows = w.unsqueeze(-2) * powers(0, low, high);
    const at::Tensor sums =
        at::einsum("...hmrn,hln->...hmrl", {rows, powers(0, 1, low).squeeze(1)});
    return twice_real(sums).flatten(-2).narrow(-1, 0, length);
  }
  /// sum_l A^{T-1-l} u_l: u (B,NH,M,T) -> (B,NH,M,N/2)
  at::Tensor sum(const at::Tensor& u) const {
    const int64_t length = u.size(-1);
    const auto [low, high] = split(length);
    const at::Tensor backwards = at::constant_pad_nd(u.flip(-1), {0, high * low - length}, 0);
    const at::Tensor sums = at::einsum(
        "bhmrl,hln->bhmrn",
        {backwards.to(complex_type).unflatten(-1, {high, low}), powers(0, 1, low).squeeze(1)});
    return (sums * powers(0, low, high)).sum(-2);
  }

  at::ScalarType complex_type;
  at::Tensor log_a;  ///< (NH,N/2) complex128
  at::Tensor b, c;   ///< (NH,1,N/2)
};

DiagonalSsm::DiagonalSsm(int64_t num_heads, int64_t state_size, at::Device device)
    : state_size_(state_size) {
  TORCH_CHECK(state_size >= 2 && state_size % 2 == 0,
              "state_size: expected an even number >= 2, got ", state_size);
  const auto parameter = [&](const char* name, at::IntArrayRef sizes) {
    return register_parameter(name, at::zeros(sizes, parameter_options(device)));
  };
  const int64_t states = state_size / 2;
  log_step_ = parameter("log_step", {num_heads}), skip_ = parameter("skip", {num_heads});
  log_decay_ = parameter("log_decay", {num_heads, states});
  frequency_ = parameter("frequency", {num_heads, states});
  input_ = parameter("input", {num_heads, states, 2});
  output_ = parameter("output", {num_heads, states, 2});
  if (!device.is_meta()) init();
}

/// S4D-Lin: a_n = -1/2 + i pi n; steps spread logarithmically over [0.001, 0.1].
void DiagonalSsm::init() {
  const at::NoGradGuard no_grad;
  uniform_init_(log_step_, std::log(kLeastStep), std::log(kLargestStep));
  normal_init_(skip_, 1);
  log_decay_.fill_(std::log(0.5));
  frequency_.copy_(at::arange(state_size_ / 2, frequency_.options()) * std::numbers::pi);
  input_.select(-1, 0).fill_(1);
  normal_init_(output_, std::sqrt(0.5));
}

std::pair<at::Tensor, at::Tensor> DiagonalSsm::forward(
    const at::Tensor& u, const at::Tensor& h, const std::optional<at::Tensor>& reset) const {
  const int64_t batch = u.size(0), length = u.size(3);
  const Discrete ssm(*this, u.scalar_type());
  at::Tensor past, seen = u, over;  // over (B,T): the document of the given state has ended
  if (h.defined()) past = complex_of(h.to(u.scalar_type()).unflatten(-1, {-1, 2}));
  if (reset) {
    over = reset->cumsum(1) > 0;
    seen = without_past(u.movedim(3, 1), last_start(*reset)).movedim(1, 3);
  }
  at::Tensor next = ssm.sum(seen) * ssm.b;
  if (past.defined()) {
    const at::Tensor kept = past * ssm.power(length);
    next = next +
           (reset ? kept.masked_fill(over.select(1, length - 1).view({batch, 1, 1, 1}), 0) : kept);
  }
  at::Tensor y;
  if (length == 1) {
    y = twice_real((next * ssm.c).sum(-1, true));
  } else {
    y = long_convolution(u, ssm.series(ssm.c * ssm.b, length), reset);
    if (past.defined()) {
      const at::Tensor rest = ssm.series(past * ssm.c * ssm.power(1), length);
      y = y + (reset ? rest.masked_fill(over.view({batch, 1, 1, length}), 0) : rest);
    }
  }
  return {y + skip_.to(u.scalar_type()).view({-1, 1, 1}) * u, at::view_as_real(next).flatten(-2)};
}

}  // namespace xlstm::nn
