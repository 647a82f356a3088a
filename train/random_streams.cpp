#include "train/random_streams.h"

#include <ATen/Context.h>

#include <vector>

namespace xlstm::train {
namespace {

/// Handles: what is set through them is set for everyone.
std::vector<at::Generator> generators(at::Device device) {
  std::vector<at::Generator> all{at::globalContext().defaultGenerator(at::kCPU)};
  if (!device.is_cpu()) all.push_back(at::globalContext().defaultGenerator(device));
  return all;
}

}  // namespace

void seed_random_streams(at::Device device, uint64_t seed) {
  for (at::Generator generator : generators(device)) generator.set_current_seed(seed);
}

void seed_step_of_process(at::Device device, int64_t run_seed, int64_t step,
                          const ProcessPlace& place) {
  if (place.alone()) return;
  const int64_t draw = step * place.size + place.rank + 1;
  seed_random_streams(device, static_cast<uint64_t>(run_seed) + 0x9E3779B97F4A7C15U * draw);
}

void store_random_streams(at::Device device, TrainerState& state) {
  const auto random = generators(device);
  state.rng_state = random[0].get_state();
  state.device_rng_state = random.size() > 1 ? random[1].get_state() : at::Tensor();
}

void restore_random_streams(at::Device device, const TrainerState& state) {
  auto random = generators(device);
  random[0].set_state(state.rng_state);
  if (random.size() > 1 && state.device_rng_state.defined())
    random[1].set_state(state.device_rng_state);
}

}  // namespace xlstm::train
