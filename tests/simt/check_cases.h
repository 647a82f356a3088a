#pragma once
// Runs a list of cases under Catch2.
#include <string>

#include "tests/simt/cases.h"
#include "tests/simt/runtime.h"
// Not tests/support/catch.h: it needs torch's headers, and nothing here does.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

namespace simt_test {

/// Under each seed of [first, last) every kernel computes what it should and no sanitizer reports anything.
inline void all_correct(const List<Case>& list, std::uint64_t first, std::uint64_t last) {
  for (std::size_t i = 0; i < list.count; ++i) {
    for (std::uint64_t seed = first; seed < last; ++seed) {
      INFO(list.first[i].name << ", seed " << seed);
      const int before = simt::sanitizer_reports();
      CHECK_NOTHROW(list.first[i].run(seed));
      CHECK(simt::sanitizer_reports() == before);
    }
  }
}

}  // namespace simt_test
