#pragma once
// The random numbers of a run: torch's default generators of the CPU and, where the run is on one, of the GPU.
#include <c10/core/Device.h>

#include <cstdint>

#include "train/checkpoint.h"
#include "train/distributed.h"

namespace xlstm::train {

void seed_random_streams(at::Device device, uint64_t seed);

/// With several processes the random numbers of a step are a function of the run's seed, the step and the process: a
/// checkpoint need not hold a stream of each. One process goes on with the stream it has.
void seed_step_of_process(at::Device device, int64_t run_seed, int64_t step,
                          const ProcessPlace& place);

/// Copies where the streams stand into rng_state and device_rng_state.
void store_random_streams(at::Device device, TrainerState& state);
/// Goes on from there; what the state does not hold stays as it is.
void restore_random_streams(at::Device device, const TrainerState& state);

}  // namespace xlstm::train
