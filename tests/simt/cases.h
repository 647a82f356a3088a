#pragma once
// Kernels under test and kernels with a planted bug. They are compiled once per sanitizer; the Catch2 program that runs
// them is compiled once. Instrumented code must not share instantiations of std templates with the emulator, so this
// header keeps to plain types.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace simt_test {

/// A kernel that ran and computed something wrong.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  const char* name;
  void (*run)(std::uint64_t seed);
};

/// A kernel with a bug. `error`: text that the Error or Mismatch of every build contains (null: none is required).
/// `thread`, `address`: the build with that sanitizer must report at least once.
struct Planted {
  const char* name;
  void (*run)(std::uint64_t seed);
  const char* error;
  bool thread = false, address = false;
};

template <class T>
struct List {
  const T* first;
  std::size_t count;
};

List<Case> sm80_cases();
List<Case> layout_cases();
List<Case> sm90_cases();
List<Case> tensor_cases();
List<Case> wgmma_cases();
List<Planted> sm80_bugs();
List<Planted> access_bugs();
List<Planted> sm90_bugs();
List<Planted> tensor_bugs();
List<Planted> wgmma_bugs();
List<Planted> slstm_bugs();

inline void expect(bool condition, const char* what, long index = -1) {
  if (!condition)
    throw Mismatch(std::string("wrong values: ") + what + " at " + std::to_string(index));
}

/// NaN and infinities never pass.
inline void expect_near(const float* got, const double* wanted, std::size_t count, double tolerance,
                        const char* what) {
  for (std::size_t i = 0; i < count; ++i) {
    expect(std::isfinite(got[i]) && std::fabs(got[i] - wanted[i]) <= tolerance, what,
           static_cast<long>(i));
  }
}

/// Small whole numbers, exact in every format.
inline float small_value(std::uint32_t i) {
  return static_cast<float>(static_cast<int>((i * 2654435761U >> 20) % 17) - 8);
}

}  // namespace simt_test
