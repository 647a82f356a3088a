#pragma once
// The maths of the gates, and scans over doubles: exponents are differences of numbers that grow with the chunk.
#include "cuda/mlstm/mlstm_tiles.cuh"

namespace xlstm::cuda {

/// Gates below these act as zero; finite, so that differences of them stay numbers.
constexpr double kMinLogForget = -1e8, kMinLogInput = -1e30;
constexpr double kLog2e = 1.4426950408889634074;
/// -m is cut off here: above, h is zero in float32; below, exp(-m) would no longer be a normal number, and h without a query
/// 0 / 0.
constexpr double kMinNegM = -87, kMaxNegM = 80;

/// log sigmoid(x) = min(x, 0) - log1p(exp(-|x|)); NaN stays NaN.
DEVICE_FUNCTION float log_sigmoid(float x) {
  return (x < 0 ? x : 0.0F) - log1pf(expf(x < 0 ? x : -x));
}
/// The derivative of log sigmoid.
DEVICE_FUNCTION float sigmoid_of_negative(float x) { return 1.0F / (1.0F + expf(x)); }

DEVICE_FUNCTION double at_least(double x, double low) { return x < low ? low : x; }
/// The larger one, NaN if either is.
DEVICE_FUNCTION double max_nan(double a, double b) { return a > b || a != a ? a : b; }

/// 2^x of a double difference, accurate to float32.
DEVICE_FUNCTION float exp2_of(double x) { return exp2f(static_cast<float>(x)); }

/// exp(-m), what the normaliser is at least; NaN stays NaN.
DEVICE_FUNCTION float floor_of(double m) {
  return exp2_of((-m > kMaxNegM ? kMaxNegM : at_least(-m, kMinNegM)) * kLog2e);
}

DEVICE_FUNCTION u32 word_of(double x, int half) {
  u32 words[2];
  __builtin_memcpy(words, &x, 8);
  return words[half];
}
DEVICE_FUNCTION double double_of(u32 low, u32 high) {
  const u32 words[2] = {low, high};
  double x;
  __builtin_memcpy(&x, words, 8);
  return x;
}
DEVICE_FUNCTION double shfl_up(double x, u32 delta) {
  return double_of(prim::shfl_up(word_of(x, 0), delta), prim::shfl_up(word_of(x, 1), delta));
}
DEVICE_FUNCTION double shfl(double x, u32 lane) {
  return double_of(prim::shfl(word_of(x, 0), lane), prim::shfl(word_of(x, 1), lane));
}

}  // namespace xlstm::cuda
