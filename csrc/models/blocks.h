#pragma once
// The blocks of every kind of model, made from its options.
#include <memory>

#include "csrc/models/model_options.h"
#include "csrc/nn/hgrn.h"

namespace xlstm::models {

/// The block at position `index`. bounds: those of kinds that learn them for all their blocks, null for every other
/// kind. options.kind must be one of kModelKinds.
std::shared_ptr<nn::Block> make_block(const ModelOptions& options, int64_t index,
                                      const std::shared_ptr<nn::LowerBounds>& bounds,
                                      at::Device device);

}  // namespace xlstm::models
