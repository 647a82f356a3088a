#pragma once
#include <functional>
#include <memory>

namespace xlstm::train {

/// What a function enqueues on a GPU, recorded once and replayed with one launch (a CUDA graph): for work whose sizes and
/// addresses do not change. The function must not wait for the GPU, and must have run a few times before, so that
/// libraries have set themselves up. The current stream must not be the default one (use_own_stream).
class StepGraph {
 public:
  StepGraph();
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  /// Whether this build can record graphs.
  static bool available();
  /// Calls `work` once without running what it enqueues. Tensors that it makes belong to the graph: those it leaves are
  /// written anew by every replay. Rethrows what `work` or the recording throws; nothing is recorded then.
  void record(const std::function<void()>& work);
  bool recorded() const;
  void replay();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace xlstm::train
