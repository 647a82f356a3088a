#include "train/random_streams.h"

#include "csrc/nn/random_state.h"

namespace xlstm::train {

void seed_random_streams(at::Device device, uint64_t seed) {
  nn::seed_random_state(at::kCPU, seed);
  if (!device.is_cpu()) nn::seed_random_state(device, seed);
}

void seed_step_of_process(at::Device device, int64_t run_seed, int64_t step,
                          const ProcessPlace& place) {
  if (place.alone()) return;
  const int64_t draw = step * place.size + place.rank + 1;
  seed_random_streams(device, static_cast<uint64_t>(run_seed) + 0x9E3779B97F4A7C15U * draw);
}

void store_random_streams(at::Device device, TrainerState& state) {
  state.rng_state = nn::random_state(at::kCPU);
  state.device_rng_state = device.is_cpu() ? at::Tensor() : nn::random_state(device);
}

void restore_random_streams(at::Device device, const TrainerState& state) {
  nn::set_random_state(at::kCPU, state.rng_state);
  if (!device.is_cpu() && state.device_rng_state.defined())
    nn::set_random_state(device, state.device_rng_state);
}

}  // namespace xlstm::train
