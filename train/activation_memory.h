#pragma once
#include <cstdint>
#include <optional>

#include "csrc/config/config.h"

namespace xlstm::train {

/// Bytes of activations at the peak of a step: what autograd keeps of a micro batch until its backward pass, counted from
/// what the blocks of csrc/nn do, and the gradients on their way through one block. `gpu`: there, not on the CPU. Of the
/// convolutions of H3 and Hyena: as for sequences of one document. Nothing where it is not known: LSTMs that cuDNN
/// computes keep what cuDNN decides.
std::optional<int64_t> activation_bytes(const config::Config& config, bool gpu, int64_t processes);

}  // namespace xlstm::train
