#pragma once
// What the tests of single kernels share: strided tensors of any type and comparisons that NaN and infinities fail.
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_params.h"
#include "cuda/prim/prim.h"
#include "tests/simt/cases.h"

namespace simt_test {

using Numbers = std::vector<double>;

/// Fails unless all of `got` is finite and ||got - wanted|| <= tolerance ||wanted|| (or 1e-30: float32 may end there). The
/// message has the relative error and the place of the largest difference, or of the first number that is not finite.
template <class Got>
void compare(const char* name, const std::vector<Got>& got, const Numbers& wanted,
             double tolerance) {
  expect(got.size() == wanted.size(), name, static_cast<long>(got.size()));
  double wrong = 0, size = 0, largest = -1;
  size_t worst = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    expect(std::isfinite(wanted[i]), (std::string(name) + ", reference").c_str(),
           static_cast<long>(i));
    expect(std::isfinite(static_cast<double>(got[i])), name, static_cast<long>(i));
    const double difference = std::fabs(static_cast<double>(got[i]) - wanted[i]);
    wrong += difference * difference;
    size += wanted[i] * wanted[i];
    if (difference > largest) largest = difference, worst = i;
  }
  if (std::sqrt(wrong) <= tolerance * std::sqrt(size) + 1e-30) return;
  throw Mismatch(std::string("wrong values: ") + name + ", relative error " +
                 std::to_string(std::sqrt(wrong / size)) + ", most at " + std::to_string(worst) +
                 ": " + std::to_string(static_cast<double>(got[worst])) + " instead of " +
                 std::to_string(wanted[worst]));
}

/// Fails unless every number is as close as `tolerance`, relative to it or to 1.
template <class Got>
void compare_each(const char* name, const std::vector<Got>& got, const Numbers& wanted,
                  double tolerance) {
  expect(got.size() == wanted.size(), name, static_cast<long>(got.size()));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(got[i]) - wanted[i]);
    if (!(difference <= tolerance * std::fmax(1.0, std::fabs(wanted[i]))))
      throw Mismatch(std::string("wrong values: ") + name + " at " + std::to_string(i) + ": " +
                     std::to_string(static_cast<double>(got[i])) + " instead of " +
                     std::to_string(wanted[i]));
  }
}

/// How the tests cut B rows of `time` tokens, or one row of packed sequences, into chunks and slots.
struct Cut {
  int64_t batch = 1, time = 1, heads = 1, length = 64;  ///< length: of a chunk
  std::vector<int32_t> packed = {};                     ///< cu_seqlens

  int64_t sequences() const {
    return packed.empty() ? batch : static_cast<int64_t>(packed.size()) - 1;
  }
  int64_t row(int64_t sequence) const { return packed.empty() ? sequence : 0; }
  int64_t begin(int64_t sequence) const { return packed.empty() ? 0 : packed[sequence]; }
  int64_t tokens(int64_t sequence) const {
    return packed.empty() ? time : packed[sequence + 1] - packed[sequence];
  }
  int64_t first_slot(int64_t sequence) const {
    return packed.empty() ? sequence * ((time + length - 1) / length)
                          : packed[sequence] / length + sequence;
  }
  int64_t slots() const { return packed.empty() ? first_slot(batch) : time / length + sequences(); }
  int64_t positions() const { return heads * slots() * length; }
  /// Of token t of a sequence, in what is stored as [NH][slots][L].
  int64_t position(int64_t sequence, int64_t head, int64_t t) const {
    return (head * slots() + first_slot(sequence)) * length + t;
  }
  xlstm::cuda::Chunks chunks() const {
    xlstm::cuda::Chunks c;
    c.cu_seqlens = packed.empty() ? nullptr : packed.data();
    c.num_sequences = static_cast<int32_t>(sequences());
    c.time = static_cast<int32_t>(time);
    c.num_heads = static_cast<int32_t>(heads);
    c.length = static_cast<int32_t>(length);
    c.slots = static_cast<int32_t>(slots());
    return c;
  }
};

/// Where the state is emptied: (B,T), every other byte of what the kernels are given.
class Resets {
 public:
  Resets(const Cut& cut, std::vector<int64_t> at)
      : cut_(cut), memory_(static_cast<size_t>(2 * cut.batch * cut.time + 1), 1) {
    for (int64_t i = 0; i < cut.batch * cut.time; ++i) memory_[static_cast<size_t>(2 * i)] = 0;
    for (const int64_t i : at)
      if (i < cut.batch * cut.time) memory_[static_cast<size_t>(2 * i)] = 1;
  }
  bool operator()(int64_t sequence, int64_t t) const {
    const int64_t token = cut_.row(sequence) * cut_.time + cut_.begin(sequence) + t;
    return memory_[static_cast<size_t>(2 * token)] != 0;
  }
  template <class Params>
  void give_to(Params& p) const {
    p.reset = reinterpret_cast<const bool*>(memory_.data());
    p.reset_batch = 2 * cut_.time, p.reset_time = 2;
  }

 private:
  const Cut& cut_;
  std::vector<unsigned char> memory_;
};

inline double log_sigmoid(double x) {
  return x < -40 ? x : -std::log1p(std::exp(-x));  // exp(-x) may overflow
}
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

enum class Order {
  kDense,      ///< (B,T,NH,D)
  kAligned,    ///< (B,NH,T,D), rows padded to 16 bytes
  kUnaligned,  ///< (B,NH,T,D), odd gaps between rows
  kInner,      ///< (B,T,NH,D), every other number
};

/// A (B,T,NH,D) tensor. Memory outside its numbers is NaN and must stay so.
class StridedTensor {
 public:
  StridedTensor(int64_t batch, int64_t time, int64_t heads, int64_t width, xlstm::cuda::Dtype dtype,
                Order order = Order::kDense)
      : batch_(batch), time_(time), heads_(heads), width_(width), dtype_(dtype) {
    view.inner = order == Order::kInner ? 2 : 1;
    if (order == Order::kDense || order == Order::kInner) {
      view.head = width * view.inner;
      view.time = heads * view.head;
      view.batch = time * view.time;
    } else {
      view.time = order == Order::kAligned ? (width + 15) / 8 * 8 : width + 3;
      view.head = time * view.time;
      view.batch = heads * view.head + (order == Order::kAligned ? 8 : 1);
    }
    const int64_t numbers = batch * view.batch + view.inner;
    used_.assign(static_cast<size_t>(numbers), false);
    memory_.assign(static_cast<size_t>(numbers * bytes()) + 32, 0xff);
    first_ = 0;
    while (reinterpret_cast<uintptr_t>(memory_.data() + first_) % 16 != 0) ++first_;
    view.data = memory_.data() + first_;
    for_each([&](int64_t i) { used_[static_cast<size_t>(i)] = true; });
  }
  StridedTensor(const StridedTensor&) = delete;
  StridedTensor& operator=(const StridedTensor&) = delete;

  int64_t at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return b * view.batch + t * view.time + h * view.head + d * view.inner;
  }
  void* token(int64_t t) const { return static_cast<char*>(view.data) + t * view.time * bytes(); }
  double get(int64_t b, int64_t t, int64_t h, int64_t d = 0) const {
    return number(at(b, t, h, d));
  }
  void set(int64_t b, int64_t t, int64_t h, int64_t d, double value) {
    put(at(b, t, h, d), static_cast<float>(value));
  }
  void fill(std::mt19937& random, double mean, double spread) {
    std::normal_distribution<double> normal(mean, spread);
    for_each([&](int64_t i) { put(i, static_cast<float>(normal(random))); });
  }
  /// The rows of `length` tokens of one head.
  Numbers rows(int64_t b, int64_t begin, int64_t length, int64_t h) const {
    Numbers out;
    for (int64_t t = begin; t < begin + length; ++t)
      for (int64_t d = 0; d < width_; ++d) out.push_back(get(b, t, h, d));
    return out;
  }
  Numbers all() const {
    Numbers out;
    for_each([&](int64_t i) { out.push_back(number(i)); });
    return out;
  }
  void expect_gaps_untouched(const char* name) const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const size_t index = (i - first_) / static_cast<size_t>(bytes());
      if (i >= first_ && index < used_.size() && used_[index]) continue;
      expect(memory_[i] == 0xff, (std::string("written outside of ") + name).c_str(),
             static_cast<long>(i));
    }
  }
  xlstm::cuda::Operand operand() const {
    bool vector = view.inner == 1;
    for (const int64_t stride : {view.batch, view.time, view.head})
      if (stride * bytes() % 16 != 0) vector = false;
    return {view.data, view.batch, view.time, view.head, view.inner, static_cast<int32_t>(width_),
            dtype_,    vector};
  }

  xlstm::cuda::View view;

 private:
  int64_t bytes() const { return dtype_ == xlstm::cuda::Dtype::kFloat32 ? 4 : 2; }
  template <class F>
  void for_each(F f) const {
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t t = 0; t < time_; ++t)
        for (int64_t h = 0; h < heads_; ++h)
          for (int64_t d = 0; d < width_; ++d) f(at(b, t, h, d));
  }
  double number(int64_t i) const {
    if (dtype_ == xlstm::cuda::Dtype::kFloat32) return static_cast<const float*>(view.data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(view.data)[i];
    return dtype_ == xlstm::cuda::Dtype::kBFloat16 ? prim::bf16_to_float(bits)
                                                   : prim::f16_to_float(bits);
  }
  void put(int64_t i, float x) {
    if (dtype_ == xlstm::cuda::Dtype::kFloat32) {
      static_cast<float*>(view.data)[i] = x;
    } else {
      static_cast<uint16_t*>(view.data)[i] =
          dtype_ == xlstm::cuda::Dtype::kBFloat16 ? prim::float_to_bf16(x) : prim::float_to_f16(x);
    }
  }

  int64_t batch_, time_, heads_, width_;
  xlstm::cuda::Dtype dtype_;
  std::vector<bool> used_;
  std::vector<unsigned char> memory_;
  size_t first_;
};

/// `count` float32 numbers with a NaN on either side; `shift` floats away from 16-byte alignment.
class GuardedFloats {
 public:
  explicit GuardedFloats(int64_t count, int64_t shift = 0)
      : count_(count), memory_(static_cast<size_t>(count) + 12, NAN) {
    first_ = 1;
    while (reinterpret_cast<uintptr_t>(&memory_[static_cast<size_t>(first_)]) % 16 != 0) ++first_;
    first_ += shift;
  }
  GuardedFloats(const GuardedFloats&) = delete;
  GuardedFloats& operator=(const GuardedFloats&) = delete;
  float* data() { return &memory_[static_cast<size_t>(first_)]; }
  float& operator[](int64_t i) { return memory_[static_cast<size_t>(first_ + i)]; }
  Numbers slice(int64_t begin, int64_t count) const {
    return {memory_.begin() + first_ + begin, memory_.begin() + first_ + begin + count};
  }
  void fill(std::mt19937& random, double mean, double spread) {
    std::normal_distribution<double> normal(mean, spread);
    for (int64_t i = 0; i < count_; ++i) (*this)[i] = static_cast<float>(normal(random));
  }
  void expect_guards_untouched(const char* name) const {
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); ++i)
      if (i < first_ || i >= first_ + count_)
        expect(std::isnan(memory_[static_cast<size_t>(i)]),
               (std::string("written outside of ") + name).c_str(), static_cast<long>(i));
  }

 private:
  int64_t count_, first_;
  std::vector<float> memory_;
};

}  // namespace simt_test
