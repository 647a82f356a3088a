// From tensors to the real CUDA kernels and back, on the CPU: csrc/ops/*_kernels.cpp with the emulator behind them, against
// the paths that take a call where no kernel does.
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "csrc/ops/causal_conv1d_generic.h"
#include "csrc/ops/causal_conv1d_kernels.h"
#include "csrc/ops/linear_int8_generic.h"
#include "csrc/ops/linear_int8_kernels.h"
#include "csrc/ops/mlstm_generic.h"
#include "csrc/ops/mlstm_kernels.h"
#include "csrc/ops/mlstm_step_inputs_kernels.h"
#include "csrc/ops/norm_generic.h"
#include "csrc/ops/norm_kernels.h"
#include "tests/ops/mlstm_cases.h"

namespace {

using at::Tensor;
using xlstm::ops::MlstmArguments;
using xlstm::ops::OptionalTensor;
using xlstm::test::Case;
using xlstm::test::Problem;

template <class Results>
std::vector<Tensor> list(const Results& results) {
  return std::apply([](const auto&... x) { return std::vector<Tensor>{x...}; }, results);
}

double difference(const Tensor& a, const Tensor& b) {
  const Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
  const double size = at::linalg_vector_norm(y).item<double>();
  return at::linalg_vector_norm(x - y).item<double>() / (size == 0 ? 1 : size);
}

void check_close(const std::vector<std::string>& names, const std::vector<Tensor>& kernels,
                 const std::vector<Tensor>& generic, const std::vector<double>& tolerances) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (!generic[i].defined()) continue;
    REQUIRE(kernels[i].sizes() == generic[i].sizes());
    REQUIRE(kernels[i].scalar_type() == generic[i].scalar_type());
    INFO(names[i] << ": relative difference " << difference(kernels[i], generic[i]));
    CHECK(difference(kernels[i], generic[i]) <= tolerances[i]);
  }
}

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
  const xlstm::ops::MlstmDevice device{{80, 4, 163 * 1024}};
  REQUIRE(xlstm::ops::mlstm_kernels_lack(sizes, type, device.limits).empty());

  const Tolerances limit = tolerances(type);
  const auto forward = list(xlstm::ops::mlstm_kernels_forward(a, sizes, device, which.normalize));
  const auto expected = list(xlstm::ops::mlstm_generic_forward(a));
  check_close({"h", "c", "n", "m"}, forward, expected,
              {limit.value, limit.value, limit.value, 1e-6});

  const bool ends = which.states;
  xlstm::ops::MlstmBackwardArguments b{p.dh.to(type), {}, {}, a, expected[0], expected[4]};
  if (ends) b.dc = p.dc.to(at::kFloat), b.dn = p.dn.to(at::kFloat);
  check_close(
      {"dq", "dk", "dv", "digate", "dfgate", "dc0", "dn0"},
      list(xlstm::ops::mlstm_kernels_backward(b, sizes, device)),
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

namespace {

/// cu_seqlens that nothing looks at, and what they are to be taken for: a padded tail, a late first token, ends beyond T, one
/// whose 32 bits look right, one that falls.
std::vector<std::pair<Tensor, Tensor>> doubtful_offsets() {
  const Tensor plain = at::tensor({0, 32, 64}, at::kInt);
  return {{at::tensor({0, 32, 40}, at::kLong), plain},
          {at::tensor({5, 32, 64}, at::kInt), plain},
          {at::tensor({-7, 32, 6400}, at::kInt), plain},
          {at::tensor({int64_t{0}, int64_t{32}, (int64_t{1} << 32) + 40}, at::kLong), plain},
          {at::tensor({0, 48, 7, 64}, at::kInt), at::tensor({0, 48, 48, 64}, at::kInt)}};
}

/// The same bits, and none of memory that nobody wrote.
void check_same(const std::vector<Tensor>& got, const std::vector<Tensor>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i].defined()) CHECK(at::equal(got[i], wanted[i]));
}

}  // namespace

TEST_CASE("mLSTM: the kernels take cu_seqlens to go from 0 to T", "[mlstm]") {
  for (const int64_t width : {16, 192}) {
    const Problem p({.batch = 1, .time = 64, .heads = 1, .dqk = width, .dv = 16, .states = false});
    MlstmArguments a = xlstm::test::arguments(p);
    for (Tensor* x : {&a.q, &a.k, &a.v, &a.igate, &a.fgate}) *x = x->to(at::kFloat);
    const xlstm::ops::MlstmDevice device{{80, 4, 163 * 1024}};
    const auto both = [&](const Tensor& cu_seqlens) {
      a.cu_seqlens = cu_seqlens;
      const auto sizes = xlstm::ops::check_mlstm_arguments(a);
      std::vector<Tensor> all = list(xlstm::ops::mlstm_kernels_forward(a, sizes, device, true));
      for (const Tensor& x : list(xlstm::ops::mlstm_kernels_backward(
               {p.dh.to(at::kFloat), {}, {}, a, all[0], all[4]}, sizes, device)))
        all.push_back(x);
      return all;
    };
    for (const auto& [doubtful, plain] : doubtful_offsets())
      check_same(both(doubtful), both(plain));
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
    const Tensor h = xlstm::ops::mlstm_kernels_step(a, sizes, {{80, 4, 163 * 1024}});
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
        const xlstm::ops::MlstmDevice device{{80, 4, 163 * 1024}};
        std::vector<Tensor> hs, expected;
        for (int64_t t = 0; t < kTime; ++t) {
          const auto token = [t](const Tensor& x) { return x.select(1, t); };
          const Tensor q = token(p.q).to(type), k = token(p.k).to(type), v = token(p.v).to(type),
                       i = floats(token(p.igate)), f = floats(token(p.fgate)) + 2;
          const bool normalize = tokens != 7;
          const xlstm::ops::MlstmLazyArguments a{
              {q, k, v, i, f, c, n, m, gate, normalize, {}, 1e-6}, ring};
          hs.push_back(xlstm::ops::mlstm_kernels_step_lazy(
              a, xlstm::ops::check_mlstm_lazy_arguments(a), device));
          expected.push_back(xlstm::ops::mlstm_generic_step(
              {q, k, v, i, f, c_plain, n_plain, m_plain, gate, normalize, {}, 1e-6}));
        }
        CHECK(at::equal(ring.count, at::full({2, 2}, kTime % tokens, at::kInt)));
        const xlstm::ops::MlstmFoldArguments fold{c, n, m, ring, gate};
        xlstm::ops::mlstm_kernels_fold(fold, xlstm::ops::check_mlstm_fold_arguments(fold), device);
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
  const xlstm::cuda::DeviceLimits limits{80, 4, 163 * 1024};
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
      REQUIRE(xlstm::ops::mlstm_step_inputs_kernels_lack(a, sizes, limits).empty());
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
                                                      {80, 4, 163 * 1024});
  };
  CHECK(lack(48, 4, at::kFloat, at::kFloat).empty());
  CHECK(lack(48, 4, at::kDouble, at::kDouble) == "float64");
  CHECK(lack(48, 4, at::kBFloat16, at::kFloat) == "a convolution of another type");
  CHECK(lack(48, 3, at::kFloat, at::kFloat) == "48 channels in blocks of 3 with 2 heads");
  CHECK(lack(44, 4, at::kHalf, at::kHalf) == "44 channels in blocks of 4 with 2 heads");
}

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
    for (const auto& [doubtful, plain] : doubtful_offsets())
      check_same(both(doubtful, kernels), both(plain, kernels));
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
