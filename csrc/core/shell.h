#pragma once
#include <string>

namespace xlstm {

/// An argument as a shell takes it: in single quotes where it has characters that mean something there.
std::string shell_quoted(const std::string& argument);

}  // namespace xlstm
