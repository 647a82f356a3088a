#pragma once
// Torch's default generators, which any thread may draw from meanwhile: each access holds the generator's mutex.
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace xlstm::nn {

/// Where the stream of a device stands (uint8, on the CPU).
at::Tensor random_state(at::Device device);
/// Goes on from there, for everyone.
void set_random_state(at::Device device, const at::Tensor& state);
void seed_random_state(at::Device device, uint64_t seed);

}  // namespace xlstm::nn
