#pragma once
// Scratch memory of a call: counted first, then handed out piece by piece.
#include <cstddef>
#include <cstdint>

namespace xlstm::cuda {

enum class Direction { kForward, kBackward };

/// Hands out pieces of one allocation; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace xlstm::cuda
