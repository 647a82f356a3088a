#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

namespace xlstm::train {

/// "cpu", "cuda" or "auto" (a GPU where torch sees one). Throws Error(kConfig) for "cuda" without one; `setting` names
/// what was asked for in the message.
at::Device choose_device(const std::string& name, const std::string& setting);

/// Of a model's weights, as nn::round_weights takes it: "float32", "bfloat16_weights" or "int8_weights", and where there is
/// autocast "bfloat16", whose weights are float32. Throws Error(kConfig) for another name.
at::ScalarType choose_weights_dtype(const std::string& name, const std::string& setting,
                                    bool autocast = false);

/// On a GPU: the calling thread works on a stream of its own from now on. The default stream cannot be captured in a
/// graph, and one stream for everything keeps the order of training, evaluation and saving.
void use_own_stream(at::Device device);

/// Waits for everything that was enqueued on the calling thread's stream. Nothing on a CPU.
void wait_for(at::Device device);

/// Gives back to the GPU what torch's allocator holds in reserve. Nothing on a CPU.
void release_reserved_memory(at::Device device);

/// Largest memory held so far: of the process, or on a GPU of torch's allocator.
double peak_memory_gib(at::Device device);

/// Memory that can still be had: the machine's, or its control group's where that is less, or the GPU's; -1: unknown.
int64_t available_memory_bytes(at::Device device);

/// "2 threads" or "cuda:0".
std::string describe(at::Device device);

}  // namespace xlstm::train
