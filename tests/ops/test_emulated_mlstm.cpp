// The mLSTM from tensors to the real CUDA kernels and back, on the CPU: csrc/ops/mlstm*_kernels.cpp with the emulator behind
// them, against the paths that take a call where no kernel does.
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <string>
#include <vector>

#include "csrc/ops/mlstm_generic.h"
#include "csrc/ops/mlstm_kernels.h"
#include "csrc/ops/mlstm_step_inputs_kernels.h"
#include "tests/ops/kernel_results.h"
#include "tests/ops/mlstm_cases.h"

namespace {

using at::Tensor;
using xlstm::ops::MlstmArguments;
using xlstm::ops::OptionalTensor;
using xlstm::test::Case;
using xlstm::test::check_close;
using xlstm::test::list;
using xlstm::test::Problem;

const xlstm::ops::MlstmDevice kAmpere{{80, 4, 163 * 1024}};

/// What both may be away from the float64 reference, together.
struct Tolerances {
  double value, forget;
};
Tolerances tolerances(at::ScalarType type) {
  return type == at::kFloat ? Tolerances{4e-5, 4e-5} : Tolerances{1e-2, 2e-2};
}

void check_mlstm(const Case& which, at::ScalarType type, const OptionalTensor& cu_seqlens = {}) {
  INFO("T " << which.time << " heads " << which.dqk << " x " << which.dv << " states "
            << which.states << " resets " << which.resets << " sigmoid " << which.sigmoid
            << " normalize " << which.normalize << " " << c10::toString(type));
  const Problem p(which);
  MlstmArguments a = xlstm::test::arguments(p);
  for (Tensor* x : {&a.q, &a.k, &a.v}) *x = x->to(type);
  for (Tensor* x : {&a.igate, &a.fgate}) *x = x->to(at::kFloat);
  for (OptionalTensor* x : {&a.c0, &a.n0, &a.m0})
    if (*x) *x = (*x)->to(at::kFloat);
  a.igate = a.igate - 2;
  a.fgate = a.fgate + 2;
  a.eps = 1e-6;
  a.cu_seqlens = cu_seqlens;
  const auto sizes = xlstm::ops::check_mlstm_arguments(a);
  REQUIRE(xlstm::ops::mlstm_kernels_lack(sizes, type, kAmpere.limits).empty());

  const Tolerances limit = tolerances(type);
  const auto forward = list(xlstm::ops::mlstm_kernels_forward(a, sizes, kAmpere, which.normalize));
  const auto expected = list(xlstm::ops::mlstm_generic_forward(a));
  check_close({"h", "c", "n", "m"}, forward, expected,
              {limit.value, limit.value, limit.value, 1e-6});

  const bool ends = which.states;
  xlstm::ops::MlstmBackwardArguments b{p.dh.to(type), {}, {}, a, expected[0], expected[4]};
  if (ends) b.dc = p.dc.to(at::kFloat), b.dn = p.dn.to(at::kFloat);
  check_close(
      {"dq", "dk", "dv", "digate", "dfgate", "dc0", "dn0"},
      list(xlstm::ops::mlstm_kernels_backward(b, sizes, kAmpere)),
      list(xlstm::ops::mlstm_generic_backward(b)),
      {limit.value, limit.value, limit.value, limit.value, limit.forget, limit.value, limit.value});
}

}  // namespace

TEST_CASE("mLSTM: the fused sweep agrees with the generic path", "[mlstm]") {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const bool states : {false, true}) {
      check_mlstm({.batch = 2,
                   .time = 130,
                   .heads = 2,
                   .dqk = 24,
                   .dv = 40,
                   .states = states,
                   .resets = !states},
                  type);
      check_mlstm({.batch = 1,
                   .time = 65,
                   .heads = 2,
                   .dqk = 64,
                   .dv = 128,
                   .states = states,
                   .resets = states,
                   .sigmoid = true,
                   .normalize = states},
                  type);
    }
    check_mlstm({.batch = 1,
                 .time = 200,
                 .heads = 2,
                 .dqk = 16,
                 .dv = 16,
                 .states = false,
                 .resets = false},
                type, at::tensor({0, 0, 63, 64, 130, 200}, at::kLong));
  }
}

TEST_CASE("mLSTM: the kernels take cu_seqlens to go from 0 to T", "[mlstm]") {
  for (const int64_t width : {16, 192}) {
    const Problem p({.batch = 1, .time = 64, .heads = 1, .dqk = width, .dv = 16, .states = false});
    MlstmArguments a = xlstm::test::arguments(p);
    for (Tensor* x : {&a.q, &a.k, &a.v, &a.igate, &a.fgate}) *x = x->to(at::kFloat);
    const auto both = [&](const Tensor& cu_seqlens) {
      a.cu_seqlens = cu_seqlens;
      const auto sizes = xlstm::ops::check_mlstm_arguments(a);
      std::vector<Tensor> all = list(xlstm::ops::mlstm_kernels_forward(a, sizes, kAmpere, true));
      for (const Tensor& x : list(xlstm::ops::mlstm_kernels_backward(
               {p.dh.to(at::kFloat), {}, {}, a, all[0], all[4]}, sizes, kAmpere)))
        all.push_back(x);
      return all;
    };
    for (const auto& [doubtful, plain] : xlstm::test::doubtful_offsets())
      xlstm::test::check_same(both(doubtful), both(plain));
  }
}

TEST_CASE("mLSTM: the state and out kernels of large heads agree with the generic path",
          "[mlstm]") {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const bool states : {false, true})
      check_mlstm({.batch = 1,
                   .time = 70,
                   .heads = 2,
                   .dqk = 192,
                   .dv = 136,
                   .states = states,
                   .resets = !states},
                  type);
}

TEST_CASE("mLSTM: the step kernels agree with the generic path", "[mlstm]") {
  const Problem p({.batch = 3, .time = 5, .heads = 2, .dqk = 40, .dv = 24});
  const auto floats = [](const Tensor& x) { return x.to(at::kFloat); };
  Tensor c = floats(p.c0), n = floats(p.n0), m = floats(p.m0);
  Tensor c_generic = c.clone(), n_generic = n.clone(), m_generic = m.clone();
  for (int64_t t = 0; t < 5; ++t) {
    const auto token = [&](const Tensor& x) { return floats(x.select(1, t)); };
    const Tensor q = token(p.q), k = token(p.k), v = token(p.v), igate = token(p.igate),
                 fgate = token(p.fgate);
    const auto arguments = [&](Tensor& c_in, Tensor& n_in, Tensor& m_in) {
      return xlstm::ops::MlstmStepArguments{q,    k,    v,     igate, fgate, c_in,
                                            n_in, m_in, "exp", true,  {},    1e-6};
    };
    const auto a = arguments(c, n, m);
    const auto sizes = xlstm::ops::check_mlstm_step_arguments(a);
    const Tensor h = xlstm::ops::mlstm_kernels_step(a, sizes, kAmpere);
    const Tensor expected =
        xlstm::ops::mlstm_generic_step(arguments(c_generic, n_generic, m_generic));
    check_close({"h", "c", "n", "m"}, {h, c, n, m}, {expected, c_generic, n_generic, m_generic},
                {1e-5, 1e-6, 1e-6, 1e-6});
  }
}

TEST_CASE("mLSTM: the kernels of the lazy step and the fold agree with the generic step",
          "[mlstm]") {
  constexpr int64_t kTime = 40;
  const Problem p({.batch = 2, .time = kTime, .heads = 2, .dqk = 24, .dv = 70});
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t tokens : {1, 7, 16}) {
      for (const bool sigmoid : {false, true}) {
        INFO("ring of " << tokens << " sigmoid " << sigmoid << " " << c10::toString(type));
        const auto floats = [](const Tensor& x) { return x.to(at::kFloat); };
        Tensor c = floats(p.c0), n = floats(p.n0), m = floats(p.m0);
        Tensor c_plain = c.clone(), n_plain = n.clone(), m_plain = m.clone();
        const Tensor k0 = p.k.select(1, 0).to(type), v0 = p.v.select(1, 0).to(type);
        auto ring = xlstm::ops::empty_mlstm_ring(k0, v0, tokens);
        const std::string_view gate = sigmoid ? "sigmoid" : "exp";
        std::vector<Tensor> hs, expected;
        for (int64_t t = 0; t < kTime; ++t) {
          const auto token = [t](const Tensor& x) { return x.select(1, t); };
          const Tensor q = token(p.q).to(type), k = token(p.k).to(type), v = token(p.v).to(type),
                       i = floats(token(p.igate)), f = floats(token(p.fgate)) + 2;
          const bool normalize = tokens != 7;
          const xlstm::ops::MlstmLazyArguments a{
              {q, k, v, i, f, c, n, m, gate, normalize, {}, 1e-6}, ring};
          hs.push_back(xlstm::ops::mlstm_kernels_step_lazy(
              a, xlstm::ops::check_mlstm_lazy_arguments(a), kAmpere));
          expected.push_back(xlstm::ops::mlstm_generic_step(
              {q, k, v, i, f, c_plain, n_plain, m_plain, gate, normalize, {}, 1e-6}));
        }
        CHECK(at::equal(ring.count, at::full({2, 2}, kTime % tokens, at::kInt)));
        const xlstm::ops::MlstmFoldArguments fold{c, n, m, ring, gate};
        xlstm::ops::mlstm_kernels_fold(fold, xlstm::ops::check_mlstm_fold_arguments(fold), kAmpere);
        CHECK(ring.count.sum().item<int64_t>() == 0);
        check_close({"h", "c", "n", "m"}, {at::stack(hs), c, n, m},
                    {at::stack(expected), c_plain, n_plain, m_plain},
                    {type == at::kFloat ? 2e-5 : 5e-3, 2e-5, 2e-5, 2e-6});
      }
    }
  }
}

namespace {

xlstm::ops::MlstmInputParameters input_parameters(int64_t channels, int64_t width, int64_t size,
                                                  int64_t heads, bool biases, at::ScalarType type) {
  const auto randn = [type](at::IntArrayRef sizes) { return at::randn(sizes, type); };
  const auto bias = [&] { return biases ? OptionalTensor(randn({channels})) : std::nullopt; };
  const auto map = [&] { return randn({channels / size, size, size}); };
  xlstm::ops::MlstmInputParameters p;
  p.conv_weight = randn({channels, width}), p.conv_bias = bias();
  p.q_weight = map(), p.q_bias = bias();
  p.k_weight = map(), p.k_bias = bias();
  p.v_weight = map(), p.v_bias = bias();
  p.igate_weight = randn({heads, 3 * channels}), p.igate_bias = randn({heads});
  p.fgate_weight = randn({heads, 3 * channels}), p.fgate_bias = randn({heads});
  return p;
}

/// The same numbers, not at a multiple of 16 bytes.
Tensor between(const Tensor& x) {
  return at::cat({x.flatten().narrow(0, 0, 1), x.flatten()}).narrow(0, 1, x.numel()).view_as(x);
}

}  // namespace

TEST_CASE("mLSTM: the kernel of a step's inputs agrees with the separate operators", "[mlstm]") {
  const std::vector<std::string> names{"a", "q", "k", "v", "igate", "fgate"};
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t size : {2, 4, 8}) {
      at::manual_seed(9);
      const bool plain = size == 4;  // else memory that has to be packed first
      auto p = input_parameters(48, 4, size, 3, plain, type);
      Tensor x = at::randn({3, 96}, type).narrow(1, 48, 48), window = at::randn({3, 3, 48}, type);
      if (!plain) {
        p.q_weight = between(p.q_weight), p.fgate_weight = between(p.fgate_weight);
        p.conv_weight = p.conv_weight.t().contiguous().t();
        x = between(x.contiguous()), window = window.transpose(1, 2).contiguous().transpose(1, 2);
      }
      Tensor other = window.clone();
      INFO("S " << size << " " << c10::toString(type));
      const xlstm::ops::MlstmStepInputsArguments a{x, p, window}, b{x, p, other};
      const auto sizes = xlstm::ops::check_mlstm_step_inputs(a);
      REQUIRE(xlstm::ops::mlstm_step_inputs_kernels_lack(a, sizes, kAmpere.limits).empty());
      const double limit = type == at::kFloat ? 2e-6 : 1e-2;
      check_close(names, list(xlstm::ops::mlstm_step_inputs_kernels_forward(a, sizes, nullptr)),
                  list(xlstm::ops::mlstm_step_inputs_generic(b)), std::vector<double>(6, limit));
      CHECK(at::equal(window, other));
    }
  }
}

TEST_CASE("mLSTM: a step's inputs that are left to the separate operators", "[mlstm]") {
  const auto lack = [](int64_t channels, int64_t size, at::ScalarType type, at::ScalarType conv) {
    auto p = input_parameters(channels, 4, size, 2, true, type);
    p.conv_weight = p.conv_weight.to(conv);
    const Tensor x = at::randn({2, channels}, type);
    Tensor window = at::randn({2, 3, channels}, type);
    const xlstm::ops::MlstmStepInputsArguments a{x, p, window};
    return xlstm::ops::mlstm_step_inputs_kernels_lack(a, xlstm::ops::check_mlstm_step_inputs(a),
                                                      kAmpere.limits);
  };
  CHECK(lack(48, 4, at::kFloat, at::kFloat).empty());
  CHECK(lack(48, 4, at::kDouble, at::kDouble) == "float64");
  CHECK(lack(48, 4, at::kBFloat16, at::kFloat) == "a convolution of another type");
  CHECK(lack(48, 3, at::kFloat, at::kFloat) == "48 channels in blocks of 3 with 2 heads");
  CHECK(lack(44, 4, at::kHalf, at::kHalf) == "44 channels in blocks of 4 with 2 heads");
}
