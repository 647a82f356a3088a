#pragma once
#include "csrc/config/config.h"

namespace xlstm::config {

/// Throws Error(kConfig) when settings of the model contradict each other, or one of them belongs
/// to the other kind.
void validate_model(const Config& config);

}  // namespace xlstm::config
