#pragma once
#include "csrc/models/language_model.h"

namespace xlstm::train {

/// Floating point operations of the forward pass for one token: two per weight of every matrix that a token meets
/// (projections, convolutions, recurrences, the head; not the embedding), and four per number of a matrix memory
/// (update and read). No chunk size, no recomputation: what the model needs, however it is computed. The backward pass
/// counts as two of these.
/// Runs one token to see the memories.
double forward_flops_per_token(models::LanguageModel& model);

}  // namespace xlstm::train
