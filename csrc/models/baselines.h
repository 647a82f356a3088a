#pragma once
// Blocks of the models that xLSTM is compared with.
#include <memory>

#include "csrc/models/model_options.h"
#include "csrc/nn/hgrn.h"

namespace xlstm::models {

/// ceil(factor * dim / multiple) * multiple: the rounding of the paper's blocks.
int64_t rounded_up(double factor, int64_t dim, int64_t multiple);

/// Null for the library's own kinds. bounds: those of HGRN and HGRN2, null for every other kind.
std::shared_ptr<nn::Block> make_baseline_block(const ModelOptions& options, int64_t index,
                                               const std::shared_ptr<nn::LowerBounds>& bounds,
                                               at::Device device);

}  // namespace xlstm::models
