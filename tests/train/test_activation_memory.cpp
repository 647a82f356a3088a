// The estimate of activations against what torch's CPU allocator hands out in a forward and a backward pass.
#include <ATen/Parallel.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>

#include "csrc/models/language_model.h"
#include "tests/support/catch.h"
#include "train/activation_memory.h"
#include "train/autocast.h"

using namespace xlstm;

namespace {

constexpr double kTolerance = 0.25;

/// What is held of the memory that this thread has taken while one lives, and the most of it.
struct Meter : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
    held += bytes;
    most = std::max(most, held);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t held = 0, most = 0;
};

config::Config small(const std::string& kind) {
  config::Config config;
  config.model.kind = kind;
  config.model.vocab_size = 50, config.model.embedding_dim = 64, config.model.num_blocks = 4;
  config.model.state_size = 16;
  config.data.seq_len = 96;
  config.run.device = "cpu";
  config.train.global_batch_size = 8, config.train.micro_batch_size = 2;
  return config;
}

/// On a crowded machine the threads of so small steps wait for each other most of the time.
struct OneThread {
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before); }
  int before = at::get_num_threads();
};

int64_t peak_of_step(const config::Config& config, int64_t batch) {
  const OneThread one_thread;
  const int64_t length = config.data.seq_len, vocabulary = config.model.vocab_size,
                features = config.model.input_features;
  const auto model = models::make_language_model(config.model);
  model->train();
  const at::Tensor ids = at::randint(vocabulary, {batch, length}, at::kLong);
  const at::Tensor inputs = features > 0 ? at::randn({batch, length, features}) : ids;
  std::optional<at::Tensor> reset;
  if (config.data.reset_state_at_document) {
    reset = at::zeros({batch, length}, at::kBool);
    reset->select(1, length / 3).fill_(true);
  }
  const at::Tensor targets =
      models::predicts_numbers(config.model) ? at::randn({batch, length}) : ids;
  const auto step = [&] {
    at::Tensor loss;
    {
      const train::AutocastGuard autocast(at::kCPU, config.train.dtype == "bfloat16");
      loss = model->loss(inputs, targets, reset, "sum");
    }
    loss.backward();
  };
  step();  // now there are gradients, which the second adds to
  const auto meter = std::make_shared<Meter>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
  step();
  return meter->most;
}

/// Weights, their gradients and their copies in bfloat16 are the same for two sequences and for four.
void check_estimate(const config::Config& config) {
  const auto& model = config.model;
  INFO(model.kind << ", fused " << model.fused << ", " << config.train.dtype << ", documents "
                  << config.data.reset_state_at_document);
  const auto measured = static_cast<double>(peak_of_step(config, 4) - peak_of_step(config, 2));
  const auto estimate = train::activation_bytes(config, false, 1);
  REQUIRE(estimate.has_value());
  CHECK(static_cast<double>(*estimate) == Approx(measured).epsilon(kTolerance));
}

const std::vector<std::string> kKinds = {
    "xlstm",  "xlstm_large", "lstm",  "lstm_residual", "lstm_block", "llama",
    "gpt",    "mamba",       "rwkv4", "rwkv5",         "rwkv6",      "linear_attention",
    "retnet", "gla",         "hgrn",  "hgrn2",         "h3",         "hyena"};

}  // namespace

TEST_CASE("activations of every kind of model, fused or not, in both dtypes") {
  for (const std::string& kind : kKinds) {
    for (const bool fused : {true, false}) {
      for (const char* dtype : {"float32", "bfloat16"}) {
        config::Config config = small(kind);
        config.model.fused = fused, config.train.dtype = dtype;
        config.data.reset_state_at_document = false;
        check_estimate(config);
      }
    }
  }
}

TEST_CASE("activations where documents begin: attention keeps a matrix of what it sees") {
  for (const std::string& kind : kKinds) check_estimate(small(kind));
}

TEST_CASE("activations of recomputed blocks") {
  for (const std::string& kind : kKinds) {
    config::Config config = small(kind);
    config.model.num_blocks = 8;
    config.model.activation_checkpointing = true;
    check_estimate(config);
  }
}

TEST_CASE("activations of xLSTM's variants") {
  const auto check = [](const std::function<void(config::Config&)>& change) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      config::Config config = small("xlstm");
      config.train.dtype = dtype;
      change(config);
      check_estimate(config);
    }
  };
  check([](config::Config& c) { c.model.slstm_at = {0, 1, 2, 3}; });
  check([](config::Config& c) { c.model.slstm_at = {1}, c.model.slstm.recompute = true; });
  check([](config::Config& c) {
    c.model.slstm_at = {0, 1}, c.model.slstm.conv1d_kernel_size = 0;
    c.model.feed_forward.gated = false, c.model.feed_forward.act_fn = "relu";
  });
  check([](config::Config& c) { c.model.mlstm.up_projection = "post"; });
  check([](config::Config& c) {
    c.model.mlstm.up_projection = "post", c.model.mlstm.conv1d_kernel_size = 0;
  });
  check([](config::Config& c) {
    c.model.mlstm.conv1d_kernel_size = 0, c.model.mlstm.proj_factor = 4;
  });
  check([](config::Config& c) { c.model.mlstm.igate = c.model.mlstm.fgate = "bias"; });
  check([](config::Config& c) { c.model.dropout = 0.1, c.model.add_embedding_dropout = true; });
  check([](config::Config& c) { c.model.input_features = 3; });
  check([](config::Config& c) { c.model.input_features = 3, c.model.vocab_size = 1; });
  check([](config::Config& c) { c.model.vocab_size = 2000, c.model.fused = false; });
  check([](config::Config& c) {
    c.model.vocab_size = 2000, c.model.output_logit_soft_cap = 30, c.model.fused = false;
  });
}

TEST_CASE("activations beside adapters, whatever the frozen weights are kept in") {
  for (const char* kind : {"xlstm", "xlstm_large", "llama"}) {
    for (const char* base : {"float32", "bfloat16", "int8"}) {
      for (const char* dtype : {"float32", "bfloat16"}) {
        INFO("base " << base);
        config::Config config = small(kind);
        config.model.lora.rank = 2, config.model.lora.base = base, config.train.dtype = dtype;
        check_estimate(config);
      }
    }
  }
}

TEST_CASE("frozen weights are converted for each product and not kept so until the backward pass") {
  for (const char* base : {"float32", "bfloat16", "int8"}) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      INFO("base " << base << ", " << dtype);
      config::Config config = small("xlstm_large");
      config.model.embedding_dim = 256, config.data.seq_len = 4;
      config.model.lora.rank = 2, config.model.lora.base = base, config.train.dtype = dtype;
      const int64_t in_bfloat16 = 2 * models::count_parameters(config.model);
      CHECK(peak_of_step(config, 1) < in_bfloat16 / 2);
    }
  }
}

TEST_CASE("kinds differ in what they keep, and what cuDNN keeps is not known") {
  std::vector<int64_t> estimates;
  for (const std::string& kind : kKinds)
    estimates.push_back(*train::activation_bytes(small(kind), false, 1));
  std::sort(estimates.begin(), estimates.end());
  CHECK(std::adjacent_find(estimates.begin(), estimates.end()) == estimates.end());

  config::Config lstm = small("lstm");
  CHECK(train::activation_bytes(lstm, true, 1).has_value());
  lstm.data.reset_state_at_document = false;
  CHECK(!train::activation_bytes(lstm, true, 1).has_value());
  CHECK(train::activation_bytes(lstm, false, 1).has_value());
}
