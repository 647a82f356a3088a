#pragma once
#include <optional>
#include <string>

#include "csrc/data/token_file.h"

namespace xlstm::data {

/// Format version of a sidecar: 2 where not all tokens count, which earlier programs would not see, else 1. A larger one is
/// refused.
constexpr int kSidecarVersion = 2;

/// The sidecar as JSON text, one key per line.
std::string format_sidecar(const Sidecar& sidecar);
/// Reads a sidecar; none when the file does not exist. Throws Error(kData) naming the file and the key.
std::optional<Sidecar> read_sidecar(const std::string& path);

}  // namespace xlstm::data
