// The draws of the reference codebases: spread, constants and curves, within five standard errors.
#include <cmath>

#include "csrc/nn/mamba.h"
#include "csrc/nn/rwkv5.h"
#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

constexpr int64_t kWide = 192;
constexpr int64_t kNumBlocks = 6;

double deviation(const at::Tensor& x) { return std::sqrt((x * x).mean().item<double>()); }

at::Tensor parameter(const torch::nn::Module& module, const std::string& name) {
  return module.named_parameters()[name];
}

void check_normal(const torch::nn::Module& module, const std::string& name, double std) {
  INFO(name);
  const at::Tensor x = parameter(module, name);
  const double error = 5 / std::sqrt(2.0 * static_cast<double>(x.numel()));
  REQUIRE(error < 0.2);
  CHECK(std::abs(deviation(x) / std - 1) < error);
  CHECK(std::abs(x.mean().item<double>()) < 5 * std / std::sqrt(static_cast<double>(x.numel())));
}

void check_constant(const torch::nn::Module& module, const std::string& name, double value) {
  INFO(name);
  CHECK(at::equal(parameter(module, name), at::full_like(parameter(module, name), value)));
}

TEST_CASE("mLSTM block") {
  torch::manual_seed(13);
  MlstmBlockOptions options;
  options.dim = kWide;
  options.inner_dim = 2 * kWide;
  options.num_blocks = kNumBlocks;
  const MlstmBlock block(options, at::kCPU);
  const double small = std::sqrt(2.0 / (5.0 * kWide));
  check_normal(block, "mlstm.proj_up.weight", small);
  for (const char* name : {"q", "k", "v"})
    check_normal(block, std::string("mlstm.") + name + "_proj.weight", small);
  check_normal(block, "mlstm.proj_down.weight", 2.0 / kNumBlocks / std::sqrt(double{kWide}));
  for (const char* name : {"mlstm.igate.weight", "mlstm.fgate.weight"})
    check_constant(block, name, 0);
  for (const char* name : {"norm.weight", "mlstm.out_norm.weight", "mlstm.skip"})
    check_constant(block, name, 1);
  CHECK(difference(parameter(block, "mlstm.fgate.bias"), at::tensor({3.f, 4.f, 5.f, 6.f})) < 1e-6);
  const at::Tensor igate = parameter(block, "mlstm.igate.bias");
  CHECK(igate.abs().max().item<double>() > 0);
  CHECK(igate.abs().max().item<double>() < 0.6);
  const at::Tensor conv = parameter(block, "mlstm.conv.weight");
  CHECK(conv.abs().max().item<double>() <= 0.5);
  CHECK(deviation(conv) == Approx(0.5 / std::sqrt(3.0)).epsilon(0.1));
}

TEST_CASE("gates of the mLSTM start as table 2 of arXiv 2405.04517 has them") {
  torch::manual_seed(16);
  const auto made = [](const HeadGateOptions& options) {
    HeadGate gate(3, 1000, options, at::kCPU);
    gate.init();
    return gate;
  };
  const auto x = at::randn({2, 5, 3});
  const auto row = [&](const HeadGateOptions& options) { return made(options).forward(x)[1][2]; };
  for (const char* source : {"bias", "fixed"}) {
    CHECK(at::allclose(row({source, "linspace"}), at::linspace(3, 6, 1000)));
    CHECK(row({source, "zeros"}).abs().max().item<double>() == 0);
    CHECK(at::equal(at::sigmoid(row({source, "open"}).to(at::kDouble)),
                    at::ones({1000}, at::kDouble)));
  }
  CHECK(deviation(made({"bias", "normal"}).bias) == Approx(0.1).epsilon(0.12));
  CHECK(made({"input", "linspace"}).parameters().size() == 2);
  CHECK(made({"bias", "linspace"}).parameters().size() == 1);
  CHECK(made({"fixed", "linspace"}).parameters().empty());
  CHECK(contains(message_of([&] { made({"fixed", "normal"}); }), "bias_init"));
  CHECK(contains(message_of([&] { made({"none", "zeros"}); }), "source: expected"));
  CHECK(contains(message_of([&] { made({"bias", "ones"}); }), "bias_init: expected"));
}

TEST_CASE("sLSTM block") {
  torch::manual_seed(14);
  SlstmBlockOptions options;
  options.dim = kWide;
  options.num_blocks = kNumBlocks;
  options.block_index = 3;
  options.feed_forward = {kWide, 256, kNumBlocks, "gelu", false, true};
  const double small = std::sqrt(2.0 / (5.0 * kWide));
  SECTION("defaults") {
    const SlstmBlock block(options, at::kCPU);
    for (const char* gate : {"i", "f", "z", "o"})
      check_normal(block, std::string("slstm.") + gate + "gate.weight", small);
    check_normal(block, "ffn.proj_up.weight", small);
    check_normal(block, "ffn.proj_down.weight", 2.0 / kNumBlocks / std::sqrt(double{kWide}));
    check_constant(block, "slstm.recurrent", 0);
    const at::Tensor bias = parameter(block, "slstm.bias");
    for (const int64_t gate : {0, 2, 3}) CHECK(bias[gate].abs().max().item<double>() == 0);
    for (int64_t k = 0; k < kWide / 4; ++k) {
      const double expected =
          5 - 12 * std::pow(static_cast<double>(k) / (kWide / 4 - 1), 0.3 + 1.3 * 3 / 5);
      for (int64_t head = 0; head < 4; ++head)
        CHECK(bias[1][head][k].item<double>() == Approx(expected).margin(1e-5));
    }
  }
  SECTION("standard") {
    options.bias_init = options.recurrent_weight_init = "standard";
    const SlstmBlock block(options, at::kCPU);
    const double bound = 1 / std::sqrt(double{kWide});
    for (const char* name : {"slstm.bias", "slstm.recurrent"}) {
      CHECK(parameter(block, name).abs().max().item<double>() <= bound);
      CHECK(deviation(parameter(block, name)) == Approx(bound / std::sqrt(3.0)).epsilon(0.1));
    }
  }
  SECTION("small_init") {
    options.bias_init = "small_init";
    const SlstmBlock block(options, at::kCPU);
    const at::Tensor forget = parameter(block, "slstm.bias")[1];
    CHECK(difference(forget, at::linspace(3, 6, kWide / 4).expand_as(forget)) < 1e-6);
  }
  SECTION("one unit per head") {
    options.num_heads = kWide;
    CHECK(at::equal(parameter(SlstmBlock(options, at::kCPU), "slstm.bias")[1],
                    at::full({kWide, 1}, 5.0)));
  }
  SECTION("unknown names are refused") {
    options.bias_init = "ones";
    CHECK(
        contains(message_of([&] { SlstmBlock(options, at::kCPU); }), "slstm.bias_init: expected"));
    options.bias_init = "zeros";
    options.recurrent_weight_init = "ones";
    CHECK(contains(message_of([&] { SlstmBlock(options, at::kCPU); }),
                   "slstm.recurrent_weight_init: expected"));
  }
}

TEST_CASE("7B block") {
  torch::manual_seed(15);
  XlstmLargeBlockOptions options;
  options.dim = options.v_dim = kWide;
  options.qk_dim = kWide / 2;
  options.ffn_dim = 256;
  options.num_blocks = kNumBlocks;
  const XlstmLargeBlock block(options, at::kCPU);
  const double small = std::sqrt(2.0 / (5.0 * kWide)),
               wang = 2.0 / kNumBlocks / std::sqrt(double{kWide});
  for (const char* name :
       {"mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "ffn.proj_up", "ffn.proj_up_gate"}) {
    check_normal(block, std::string(name) + ".weight", small);
  }
  for (const char* name : {"mlstm_layer.out_proj", "ffn.proj_down"}) {
    check_normal(block, std::string(name) + ".weight", wang);
  }
  for (const char* name : {"igate", "fgate", "ogate"}) {
    check_constant(block, std::string("mlstm_layer.") + name + "_preact.weight", 0);
  }
  check_constant(block, "mlstm_layer.igate_preact.bias", -10);
  CHECK(difference(parameter(block, "mlstm_layer.fgate_preact.bias"), at::linspace(3, 6, 8)) <
        1e-6);
  for (const char* name :
       {"norm_mlstm.weight", "norm_ffn.weight", "mlstm_layer.multihead_norm.weight"}) {
    check_constant(block, name, 1);
  }
}

TEST_CASE("Mamba block") {
  torch::manual_seed(17);
  MambaBlockOptions options;
  options.dim = kWide;
  options.num_blocks = kNumBlocks;
  const MambaBlock block(options, at::kCPU);
  const auto check_uniform = [&](const std::string& name, double bound) {
    INFO(name);
    const double largest = parameter(block, name + ".weight").abs().max().item<double>();
    CHECK(largest <= bound);
    CHECK(largest > 0.99 * bound);
  };
  check_uniform("in_proj", 1 / std::sqrt(double{kWide}));
  check_uniform("x_proj", 1 / std::sqrt(2.0 * kWide));
  check_uniform("out_proj", 1 / std::sqrt(2.0 * kWide * kNumBlocks));
}

TEST_CASE("RWKV-5 and RWKV-6 blocks") {
  torch::manual_seed(18);
  Rwkv5BlockOptions options;
  options.dim = kWide;
  options.num_blocks = kNumBlocks;
  options.block_index = 2;
  options.data_dependent = GENERATE(false, true);
  const Rwkv5Block block(options, at::kCPU);
  for (const char* name : {"output", "ffn_value", "ffn_receptance"})
    check_constant(block, std::string(name) + ".weight", 0);
  for (const auto& [name, gain] : std::vector<std::pair<std::string, double>>{
           {"value", 1}, {"receptance", 1}, {"ffn_key", 1}, {"key", 0.1}, {"gate", 0.1}}) {
    INFO(name);
    const at::Tensor w = parameter(block, name + ".weight");
    CHECK(difference(w.t().matmul(w), gain * gain * at::eye(kWide)) < 1e-5);
  }
  const at::Tensor scale = parameter(block, "head_norm.weight");
  CHECK(difference(scale, at::full_like(scale, std::pow(3.0 / kNumBlocks, 0.7))) < 1e-6);
  for (const char* name : {"norm.weight", "ffn_norm.weight"}) check_constant(block, name, 1);
}

}  // namespace
}  // namespace xlstm::nn::test
