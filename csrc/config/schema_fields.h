#pragma once
// How the tables of settings are written: ranges, and fields by their member's path. The tables themselves are schema.cpp,
// schema_model.cpp and schema_data.cpp.
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "csrc/config/schema.h"

namespace xlstm::config {

std::vector<Field> model_fields();
std::vector<Field> data_fields();

constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();  // sizes of tensors' axes
constexpr int64_t kMaxSteps = 1'000'000'000'000;
constexpr int64_t kMaxTokens = 1'000'000'000'000'000'000;

inline Limits any() { return {}; }
inline Limits integers(int64_t low, int64_t high = kMaxInt) {
  Limits limits;
  limits.int_low = low;
  limits.int_high = high;
  return limits;
}
inline Limits zero_or_integers(int64_t low, int64_t high) {
  Limits limits = integers(low, high);
  limits.or_zero = true;
  return limits;
}
inline Limits at_least(double low) {
  Limits limits;
  limits.low = low;
  return limits;
}
inline Limits above(double low) {
  Limits limits = at_least(low);
  limits.low_open = true;
  return limits;
}
inline Limits above_up_to(double low, double high) {
  Limits limits = above(low);
  limits.high = high;
  return limits;
}
inline Limits at_least_below(double low, double high) {
  Limits limits = at_least(low);
  limits.high = high;
  limits.high_open = true;
  return limits;
}
inline Limits between(double low, double high) {
  Limits limits = at_least_below(low, high);
  limits.low_open = true;
  return limits;
}
inline Limits text() {
  Limits limits;
  limits.not_empty = true;
  return limits;
}
inline Limits one_of(std::vector<std::string> choices) {
  Limits limits;
  limits.choices = std::move(choices);
  return limits;
}

/// A run that goes on may have another value: the function that its weights make is the same but for rounding. What changes
/// is memory, time, first weights or how it is trained.
inline Field may_change(Field field) {
  field.identity = false;
  return field;
}
/// What else but the model makes a run what it is.
inline Field identity(Field field) {
  field.identity = true;
  return field;
}
/// Each process of a run may have its own value.
inline Field per_machine(Field field) {
  field.per_machine = true;
  return field;
}

// The name is the member's own path, so that the two cannot differ.
#define XLSTM_FIELD(member, limits, doc)                                                           \
  Field {                                                                                          \
#member,                                                                                       \
        [](Config &                                                                                \
           config) -> FieldRef { return &config.member; }, limits, doc,                            \
                                                        std::string(#member).starts_with("model.") \
  }

}  // namespace xlstm::config
