#pragma once

namespace xlstm::nn {

/// While one lives, modules of this thread drop nothing, whatever mode they are in: for a pass beside training ones, which
/// may run in other threads at the same time.
class NoDropout {
 public:
  NoDropout();
  ~NoDropout();
  NoDropout(const NoDropout&) = delete;
  NoDropout& operator=(const NoDropout&) = delete;

 private:
  bool before_;
};

}  // namespace xlstm::nn
