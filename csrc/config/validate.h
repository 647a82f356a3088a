#pragma once
#include "csrc/config/config.h"

namespace xlstm::config {

/// Throws Error(kConfig) when settings of the model contradict each other, or one of them belongs
/// to the other kind.
void validate_model(const Config& config);

/// Throws Error(kConfig) when the tokens of the run are more than kMaxTokens (schema_fields.h).
void validate_tokens(const Config& config);

}  // namespace xlstm::config
