// Convolution, norms and the product with 8 bits from tensors to the real CUDA kernels and back, on the CPU:
// csrc/ops/*_kernels.cpp with the emulator behind them, against the paths that take a call where no kernel does.
#include <ATen/ops/cat.h>
#include <ATen/ops/randn.h>

#include <string>
#include <vector>

#include "csrc/ops/causal_conv1d_generic.h"
#include "csrc/ops/causal_conv1d_kernels.h"
#include "csrc/ops/linear_int8_generic.h"
#include "csrc/ops/linear_int8_kernels.h"
#include "csrc/ops/norm_generic.h"
#include "csrc/ops/norm_kernels.h"
#include "tests/ops/kernel_results.h"

namespace {

using at::Tensor;
using xlstm::ops::OptionalTensor;
using xlstm::test::check_close;
using xlstm::test::list;

}  // namespace

TEST_CASE("causal_conv1d: the kernels agree with the generic path", "[causal_conv1d]") {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const bool whole : {false, true}) {
      at::manual_seed(3);
      const auto options = at::TensorOptions().dtype(type);
      xlstm::ops::CausalConv1dArguments a{at::randn({2, 70, 48}, options),
                                          at::randn({48, 4}, options),
                                          at::randn({48}, options),
                                          {},
                                          {},
                                          {},
                                          whole};
      if (whole) {
        a.x = at::randn({2, 48, 70}, options).transpose(1, 2);
        a.state0 = at::randn({2, 3, 48}, options);
        a.reset = at::rand({2, 70}) < 0.1;
      }
      const auto sizes = xlstm::ops::check_causal_conv1d(a);
      REQUIRE(xlstm::ops::causal_conv1d_kernels_lack(sizes, type).empty());
      const double limit = type == at::kFloat ? 1e-6 : 1e-2;
      const auto expected = list(xlstm::ops::causal_conv1d_generic(a, sizes));
      check_close({"y", "state"},
                  list(xlstm::ops::causal_conv1d_kernels_forward(a, sizes, nullptr)), expected,
                  {limit, limit});
      const Tensor dy = at::randn(a.x.sizes(), options);
      const OptionalTensor dstate =
          whole ? OptionalTensor(at::randn({2, 3, 48}, options)) : std::nullopt;
      check_close({"dx", "dweight", "dbias", "dstate0"},
                  list(xlstm::ops::causal_conv1d_kernels_backward(a, sizes, dy, dstate, nullptr)),
                  list(xlstm::ops::causal_conv1d_generic_backward(a, sizes, dy, dstate)),
                  {limit, limit, limit, limit});
    }
  }
}

TEST_CASE("causal_conv1d: cu_seqlens are taken to go from 0 to T", "[causal_conv1d]") {
  at::manual_seed(5);
  xlstm::ops::CausalConv1dArguments a{
      at::randn({1, 64, 48}), at::randn({48, 4}), {}, {}, {}, {}, false};
  const Tensor dy = at::randn({1, 64, 48}), states = at::randn({3, 3, 48});
  const auto both = [&](const Tensor& cu_seqlens, bool kernels) {
    a.cu_seqlens = cu_seqlens;
    const auto sizes = xlstm::ops::check_causal_conv1d(a);
    const Tensor dstate = states.slice(0, 0, sizes.num_sequences);
    if (!kernels) {
      const auto [y, state] = xlstm::ops::causal_conv1d_generic(a, sizes);
      const auto gradients = xlstm::ops::causal_conv1d_generic_backward(a, sizes, dy, dstate);
      return std::vector<Tensor>{y, state, std::get<0>(gradients), std::get<1>(gradients)};
    }
    const auto [y, state] = xlstm::ops::causal_conv1d_kernels_forward(a, sizes, nullptr);
    const auto gradients =
        xlstm::ops::causal_conv1d_kernels_backward(a, sizes, dy, dstate, nullptr);
    return std::vector<Tensor>{y, state, std::get<0>(gradients), std::get<1>(gradients)};
  };
  for (const bool kernels : {false, true})
    for (const auto& [doubtful, plain] : xlstm::test::doubtful_offsets())
      xlstm::test::check_same(both(doubtful, kernels), both(plain, kernels));
}

TEST_CASE("causal_conv1d: the step kernel agrees with the generic path", "[causal_conv1d]") {
  at::manual_seed(4);
  const Tensor x = at::randn({3, 48}), weight = at::randn({48, 4}), bias = at::randn({48});
  Tensor state = at::randn({3, 3, 48}), state_generic = state.clone();
  const Tensor y = xlstm::ops::causal_conv1d_kernels_step(x, weight, bias, state, true, nullptr);
  const Tensor expected =
      xlstm::ops::causal_conv1d_generic_step(x, weight, bias, state_generic, true);
  check_close({"y", "state"}, {y, state}, {expected, state_generic}, {1e-6, 0});
}

namespace {

/// Inputs of headwise_norm with what the bits of `present` say; views where `strided`.
struct NormProblem {
  NormProblem(int present, at::ScalarType type, at::ScalarType parameters, bool strided) {
    at::manual_seed(5 + present);
    const auto rows = [&](at::IntArrayRef sizes) { return at::randn(sizes, type); };
    const auto parameter = [&] { return at::randn({48}, parameters); };
    x = strided ? rows({2, 3, 7, 16}).transpose(1, 2) : rows({2, 7, 3, 16});
    dy = strided ? rows({2, 7, 96}).slice(2, 48) : rows({2, 7, 48});
    if (present & 1) weight = parameter();
    if (present & 2) bias = parameter();
    if (present & 4) skip = rows({2, 7, 48}), skip_weight = parameter();
    if (present & 8) gate = strided ? rows({2, 7, 96}).slice(2, 0, 48) : rows({2, 7, 48});
  }
  Tensor x, dy;
  OptionalTensor weight, bias, skip, skip_weight, gate;
};

void check_norm(const NormProblem& p, std::string_view kind, std::string_view activation,
                double limit) {
  const xlstm::ops::HeadwiseNormArguments a{p.x,    p.weight, p.bias, p.skip,    p.skip_weight,
                                            p.gate, 1e-5,     kind,   activation};
  xlstm::ops::check_headwise_norm(a);
  REQUIRE(xlstm::ops::headwise_norm_kernels_lack(p.x).empty());
  check_close({"y"}, {xlstm::ops::headwise_norm_kernels_forward(a, nullptr)},
              {xlstm::ops::headwise_norm_generic(a)}, {limit});
  check_close({"dx", "dweight", "dbias", "dskip", "dskip_weight", "dgate"},
              list(xlstm::ops::headwise_norm_kernels_backward(p.dy, a, nullptr)),
              list(xlstm::ops::headwise_norm_generic_backward(p.dy, a)),
              std::vector<double>(6, limit));
}

}  // namespace

TEST_CASE("headwise_norm: the kernels agree with the generic path", "[norm]") {
  for (int present = 0; present < 16; ++present) {
    for (const bool strided : {false, true}) {
      for (const char* kind : {"layer", "rms"}) {
        INFO("present " << present << " strided " << strided << " " << kind);
        const char* activation = present % 3 == 0 ? "sigmoid" : "silu";
        check_norm({present, at::kFloat, at::kFloat, strided}, kind, activation, 2e-6);
        check_norm({present, at::kBFloat16, at::kFloat, strided}, kind, activation, 1e-2);
        check_norm({present, at::kHalf, at::kHalf, strided}, kind, activation, 2e-3);
      }
    }
  }
}

TEST_CASE("headwise_norm: no tokens give gradients of zero", "[norm]") {
  NormProblem p(15, at::kFloat, at::kFloat, false);
  for (Tensor* x : {&p.x, &p.dy}) *x = x->slice(1, 0, 0);
  for (OptionalTensor* x : {&p.skip, &p.gate}) *x = (*x)->slice(1, 0, 0);
  check_norm(p, "layer", "silu", 0);
}

TEST_CASE("residual_norm: the kernels agree with the generic path", "[norm]") {
  struct Types {
    at::ScalarType x, branch;
    double limit;
  };
  for (const Types& types : {Types{at::kFloat, at::kFloat, 2e-6},
                             {at::kFloat, at::kBFloat16, 2e-6},
                             {at::kBFloat16, at::kBFloat16, 1e-2},
                             {at::kHalf, at::kHalf, 2e-3}}) {
    for (const char* kind : {"layer", "rms"}) {
      for (const int64_t time : {0, 7}) {
        INFO(c10::toString(types.x) << " " << c10::toString(types.branch) << " " << kind << time);
        at::manual_seed(3);
        const Tensor x = at::randn({time, 2, 48}, types.x).transpose(0, 1);
        const Tensor branch = at::randn({2, time, 96}, types.branch).slice(2, 48);
        const OptionalTensor weight = at::randn({48}), bias = at::randn({48});
        const Tensor got = xlstm::ops::empty_residual_sum(x, branch);
        const xlstm::ops::SumNorm norm(got, weight, bias, 1e-5, kind);
        xlstm::ops::check_headwise_norm(norm.arguments());
        const Tensor y =
            xlstm::ops::residual_norm_kernels_forward(x, branch, norm.arguments(), nullptr);
        const auto wanted = xlstm::ops::residual_norm_generic(x, branch, weight, bias, 1e-5, kind);
        check_close({"sum", "y"}, {got, y}, list(wanted), {0, types.limit});
        const Tensor dy = at::randn_like(y);
        for (const OptionalTensor& dsum : {OptionalTensor(), OptionalTensor(at::randn_like(y))}) {
          const auto gradients =
              xlstm::ops::headwise_norm_kernels_backward(dy, norm.arguments(), nullptr, dsum);
          check_close(
              {"dx", "dweight", "dbias"}, list(xlstm::ops::residual_gradients(got, gradients)),
              list(xlstm::ops::residual_norm_generic_backward(dsum, dy, got, norm.arguments())),
              std::vector<double>(3, types.limit));
        }
      }
    }
  }
}

TEST_CASE("linear_int8: the kernel agrees with the generic path", "[linear_int8]") {
  at::manual_seed(8);
  for (const int64_t in : {48, 50}) {  // as it is, and padded to 64
    const Tensor weight = xlstm::ops::quantize_int8(at::randn({21, in}));
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
      for (const auto& added : {at::kFloat, at::kDouble, at::kBFloat16, at::kByte}) {
        INFO(in << " columns, " << c10::toString(type) << ", bias " << c10::toString(added));
        const OptionalTensor bias =
            added == at::kByte ? OptionalTensor() : at::randn({42}, added).slice(0, 0, 42, 2);
        const Tensor wide = at::randn({3, 4, 2 * in + 1}, type),
                     shifted = at::randn({2 * in + 1}, type).slice(0, 1).view({2, in});
        for (const Tensor& x : {wide.slice(2, 1, 1 + in), wide.slice(2, 0, 2 * in, 2), shifted,
                                wide.select(0, 1).slice(1, 0, in), wide[0][0].slice(0, 0, in)}) {
          REQUIRE(xlstm::ops::linear_int8_kernels_lack(x, weight).empty());
          const Tensor y = xlstm::ops::linear_int8_kernels_forward(x, weight, bias, nullptr);
          const Tensor wanted = xlstm::ops::linear_int8_generic(
              x.to(at::kDouble), weight, bias ? OptionalTensor(bias->to(at::kDouble)) : bias);
          check_close({"y"}, {y}, {wanted.to(type)},
                      {type == at::kFloat  ? 1e-6
                       : type == at::kHalf ? 1e-3
                                           : 8e-3});
        }
      }
    }
  }
}

TEST_CASE("linear_int8: what is left to the generic path", "[linear_int8]") {
  const auto lack = xlstm::ops::linear_int8_kernels_lack;
  const Tensor weight = xlstm::ops::quantize_int8(at::randn({4, 20}));
  const Tensor x = at::randn({2, 8, 20});
  CHECK(lack(x, weight).empty());
  CHECK(lack(x, weight.slice(0, 1)).empty());  // rows are multiples of 16 bytes
  CHECK(lack(at::randn({17, 20}), weight) == "more than 16 rows");
  CHECK(lack(x.to(at::kDouble), weight) == "float64");
  const Tensor bytes = at::cat({weight.flatten().slice(0, 0, 1), weight.flatten()}).slice(0, 1);
  CHECK_FALSE(lack(x, bytes.view(weight.sizes())).empty());
  CHECK_FALSE(lack(x, at::cat({weight, weight}, 1).slice(1, 0, weight.size(1))).empty());
}
