#pragma once
// Data parallel training: the processes that torchrun starts for one run.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace xlstm::train {

/// Which of the processes of a run this one is.
struct ProcessPlace {
  int64_t rank = 0, size = 1;
  int64_t local_rank = 0;  ///< among those of this machine: which GPU it takes
  bool alone() const { return size == 1; }
  bool leads() const { return rank == 0; }  ///< logs, saves and prints
};

/// From RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; a run of one process where there is no WORLD_SIZE.
/// Throws Error(kConfig) where they make no sense.
ProcessPlace place_from_environment();

/// Makes the GPU of this place the current one. Throws Error(kConfig) where the machine has fewer GPUs than processes.
void take_own_gpu(const ProcessPlace& place);

/// The processes of a run, each with the whole model. Every function here is called by all of them, in the same order;
/// with one process they do nothing. Numbers of the host travel by Gloo, tensors of a GPU by NCCL. Throws Error(kPeer)
/// when another process has failed or does not answer.
class ProcessGroup {
 public:
  /// Meets the others at MASTER_ADDR:MASTER_PORT. Says once on standard error for whom it waits, after five seconds, and
  /// gives them ten minutes to come; from then on, half an hour for each answer. poll: called while process 0 is there and
  /// others are not; what it throws ends the wait.
  ProcessGroup(
      const ProcessPlace& place, at::Device device, const std::function<void()>& poll = [] {});
  ~ProcessGroup();
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  const ProcessPlace& place() const { return place_; }
  int64_t sum(int64_t value);
  void sum(std::vector<double>& values);
  /// Of a dense tensor, in place. On a GPU it is enqueued on the current stream.
  void sum(const at::Tensor& tensor);
  bool any(bool value);
  /// Waits for what has been begun: the current stream of a GPU does, the host with tensors of the CPU.
  using Wait = std::function<void()>;
  /// Of several processes: only begins the sum of a dense tensor, in place.
  [[nodiscard]] Wait begin_sum(const at::Tensor& tensor);
  /// Of several processes: `whole` becomes the parts of all in a row; dense tensors. Only begins it.
  [[nodiscard]] Wait all_gather(at::Tensor whole, at::Tensor part);
  /// Of several processes: `part` becomes this one's of the sum of all wholes. Only begins it.
  [[nodiscard]] Wait reduce_scatter(at::Tensor part, at::Tensor whole);
  /// Those of process 0 for all, in place; or each those of the process that `from` names for it. Dense tensors.
  void broadcast(const std::vector<at::Tensor>& tensors, const std::vector<int64_t>& from = {});
  std::string broadcast(const std::string& text);
  /// A dense tensor for process `to`, which calls receive() with one like it.
  void send(const at::Tensor& tensor, int64_t to);
  /// Only begins it; several to one process arrive in their order.
  [[nodiscard]] Wait begin_send(const at::Tensor& tensor, int64_t to);
  void receive(const at::Tensor& tensor, int64_t from);
  void barrier();

 private:
  struct Impl;
  template <typename Work>
  auto guarded(Work&& work);
  ProcessPlace place_;
  std::unique_ptr<Impl> impl_;  ///< null with one process
};

}  // namespace xlstm::train
