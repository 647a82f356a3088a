#pragma once
#include <cstdint>

#include "csrc/models/model_options.h"

namespace xlstm::train {

/// Floating point operations of the forward pass for one token: two per weight of every matrix that a token meets
/// (projections, convolutions, recurrences, the head; not the embedding), four per number of a matrix memory (update and
/// read), and two per number of all keys and values up to the token, where a model keeps those: the mean over sequences
/// of seq_len tokens. No chunk size, no recomputation: what the model needs, however it is computed. H3's and Hyena's
/// convolutions over the whole sequence are left out. The backward pass counts as two of these.
/// libxlstm/flops.py has the operators' own counts by the same definition. Allocates one block.
double forward_flops_per_token(const models::ModelOptions& options, int64_t seq_len);

/// Three times that, less the gradients of matrices that are not trained.
double training_flops_per_token(const models::ModelOptions& options, int64_t seq_len);

}  // namespace xlstm::train
