// Gated linear attention from tensors to the real CUDA kernels and back, on the CPU: csrc/ops/gated_linear_attention_kernels.cpp
// with the emulator behind it, against the chunks of ATen calls in float64.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "csrc/ops/gated_linear_attention_kernels.h"
#include "tests/support/catch.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

void check_close(const std::string& name, const Tensor& got, const Tensor& wanted) {
  if (!wanted.defined()) {
    CHECK_FALSE(got.defined());
    return;
  }
  REQUIRE(got.sizes() == wanted.sizes());
  const double error = at::linalg_vector_norm(got.to(at::kDouble) - wanted).item<double>() /
                       (at::linalg_vector_norm(wanted).item<double>() + 1e-30);
  INFO(name << ": relative difference " << error);
  CHECK(error <= 2e-5);
}

GatedChunks in_double(GatedChunks x) {
  for (Tensor* t : {&x.q, &x.k, &x.v, &x.g, &x.u, &x.state0})
    if (t->defined()) *t = t->to(at::kDouble);
  return x;
}

/// Outputs and gradients of the kernels against those of the chunks in float64.
void check(const GatedChunks& in, const Tensor& dh, const Tensor& ds) {
  REQUIRE(gated_linear_attention_kernels_lack(in).empty());
  const auto [h, last] = gated_linear_attention_kernels(in, nullptr);
  const auto gradients = gated_linear_attention_kernels_backward(in, dh, ds, nullptr);
  const GatedChunks exact = in_double(in);
  const auto [wanted_h, wanted_last] = gated_linear_attention_chunks(exact);
  const auto wanted_gradients =
      gated_linear_attention_chunks_backward(exact, dh.to(at::kDouble), ds.to(at::kDouble));
  const char* names[] = {"h", "state", "dq", "dk", "dv", "dg", "du", "dstate0"};
  std::vector<Tensor> got = {h, last}, wanted = {wanted_h, wanted_last};
  got.insert(got.end(), gradients.begin(), gradients.end());
  wanted.insert(wanted.end(), wanted_gradients.begin(), wanted_gradients.end());
  REQUIRE((got.size() == std::size(names) && wanted.size() == got.size()));
  for (size_t i = 0; i < wanted.size(); ++i) {
    check_close(names[i], got[i], wanted[i]);
    for (const Tensor& t : {got[i], wanted[i]}) CHECK((!t.defined() || t.is_contiguous()));
  }
  const Tensor shut = in.g == -std::numeric_limits<float>::infinity();
  CHECK(gradients[3].masked_select(shut).eq(0).all().item<bool>());
}

void check(int64_t dk, int64_t dv, bool bonus, bool state, bool resets) {
  INFO("heads " << dk << " x " << dv << " bonus " << bonus << " state " << state << " resets "
                << resets);
  const int64_t batch = 2, time = 37, heads = 2;
  GatedChunks in;
  in.q = at::randn({batch, time, heads, dk}), in.k = at::randn({batch, time, heads, dk});
  in.v = at::randn({batch * time * heads * dv + 1}).narrow(0, 1, batch * time * heads * dv);
  in.v = in.v.view({batch, time, heads, dv});  // at an odd address
  in.g = at::rand({batch, time, heads, dk}).log() / 4;
  in.g.narrow(1, 5, 1).fill_(-std::numeric_limits<float>::infinity());
  in.scale = 0.3;
  if (bonus) in.u = at::randn({heads, dk});
  if (state) in.state0 = at::randn({batch, heads, dk, dv});
  if (resets) in.reset = at::rand({batch, time}) < 0.1;
  check(in, at::randn({batch, time, heads, dv}), at::randn({batch, heads, dk, dv}));
}

}  // namespace

TEST_CASE("gated linear attention: kernels agree with chunks in float64", "[gated]") {
  for (const bool bonus : {false, true})
    for (const bool state : {false, true}) {
      check(24, 40, bonus, state, !state);
      check(7, 5, bonus, state, true);
    }
  check(130, 66, true, true, true);
}

TEST_CASE("gated linear attention: contiguous tensors may be channels-last as well", "[gated]") {
  const int64_t batch = 2, time = 37;
  const auto make = [&](int64_t channels) {
    const Tensor x = at::randn({batch, 1, 1, channels}).permute({0, 3, 1, 2});
    REQUIRE(x.is_contiguous());
    REQUIRE(x.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
    return x;
  };
  GatedChunks in;
  in.q = make(time), in.k = make(time), in.v = make(time), in.g = -make(time).abs();
  check(in, make(time), at::randn({batch, 1, 1, 1}));
  // The heads of a state are its channels.
  const int64_t heads = 3;
  in.q = at::randn({batch, time, heads, 1}), in.k = at::randn({batch, time, heads, 1});
  in.v = at::randn({batch, time, heads, 1}), in.g = -at::rand({batch, time, heads, 1});
  in.state0 = make(heads);
  check(in, at::randn({batch, time, heads, 1}), make(heads));
}

TEST_CASE("gated linear attention: chunks have a backward pass below the Autograd kernels",
          "[gated]") {
  GatedChunks in;
  in.q = at::randn({2, 37, 2, 6}), in.k = at::randn({2, 37, 2, 6});
  in.v = at::randn({2, 37, 2, 5}), in.g = -at::rand({2, 37, 2, 6});
  in.u = at::randn({2, 6}), in.state0 = at::randn({2, 2, 6, 5});
  const Tensor dh = at::randn({2, 37, 2, 5}), ds = at::randn({2, 2, 6, 5});
  const auto wanted = gated_linear_attention_chunks_backward(in, dh, ds);
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto got = gated_linear_attention_chunks_backward(in, dh, ds);
  REQUIRE(got.size() == wanted.size());
  for (size_t i = 0; i < got.size(); ++i) {
    CHECK(at::equal(got[i], wanted[i]));
    CHECK_FALSE(got[i].requires_grad());
  }
  CHECK_FALSE(at::GradMode::is_enabled());
  CHECK(c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradFunctionality));
}

TEST_CASE("gated linear attention: what has no kernel says why", "[gated]") {
  GatedChunks in;
  const auto lack = [&](int64_t dk, int64_t dv, at::ScalarType type) {
    in.q = at::zeros({1, 1, 1, dk}, type), in.v = at::zeros({1, 1, 1, dv}, type);
    return gated_linear_attention_kernels_lack(in);
  };
  CHECK(lack(1024, 8, at::kFloat).empty());
  CHECK(lack(8, 8, at::kDouble) == "no kernels for float64");
  CHECK(lack(1025, 8, at::kFloat) == "no kernels for heads this wide");
}

}  // namespace xlstm::ops
