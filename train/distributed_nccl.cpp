#include "csrc/core/error.h"
#include "train/distributed_backends.h"

#ifdef XLSTM_NCCL
#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace xlstm::train {

#ifdef XLSTM_NCCL

BackendPtr make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                     std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, std::move(options));
}

#else

BackendPtr make_nccl(const c10::intrusive_ptr<c10d::Store>&, int, int, std::chrono::milliseconds) {
  throw Error(
      ExitCode::kConfig,
      "several processes on GPUs need NCCL, which this build has not: build it where nvcc and "
      "torch's NCCL headers are (pip's nvidia-nccl), or train with run.device=cpu");
}

#endif

}  // namespace xlstm::train
