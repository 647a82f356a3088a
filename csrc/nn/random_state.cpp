#include "csrc/nn/random_state.h"

#include <ATen/Context.h>

#include <mutex>

namespace xlstm::nn {
namespace {

template <class Work>
auto with_generator(at::Device device, const Work& work) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard lock(generator.mutex());
  return work(generator);
}

}  // namespace

at::Tensor random_state(at::Device device) {
  return with_generator(device, [](at::Generator& generator) { return generator.get_state(); });
}

void set_random_state(at::Device device, const at::Tensor& state) {
  with_generator(device, [&](at::Generator& generator) { generator.set_state(state); });
}

void seed_random_state(at::Device device, uint64_t seed) {
  with_generator(device, [&](at::Generator& generator) { generator.set_current_seed(seed); });
}

}  // namespace xlstm::nn
