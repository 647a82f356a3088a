#include "train/step_graph.h"

#include <c10/util/Exception.h>

#ifdef XLSTM_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>

#include <mutex>
#endif

namespace xlstm::train {

#ifdef XLSTM_CUDA

namespace {

/// After a recording that failed torch 2.11 takes its default generator to be recorded still, and ends the program at the
/// next draw. It goes on with a state of its own that stands where the old one did.
void renew_generator() {
  const c10::DeviceIndex device = c10::cuda::current_device();
  at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(device);
  at::Generator fresh = at::cuda::detail::createCUDAGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  fresh.set_state(generator.get_state());
  generator.graphsafe_set_state(fresh);
}

}  // namespace

struct StepGraph::Impl {
  std::unique_ptr<at::cuda::CUDAGraph> graph;
};

bool StepGraph::available() { return true; }

void StepGraph::record(const std::function<void()>& work) {
  auto graph = std::make_unique<at::cuda::CUDAGraph>();
  // Other threads (reading data ahead) may call the driver meanwhile.
  graph->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
  try {
    work();
  } catch (...) {
    try {
      graph->capture_end();  // the stream must leave the capture; that itself fails after an error
    } catch (const std::exception&) {
      renew_generator();
    }
    throw;
  }
  graph->capture_end();
  impl_->graph = std::move(graph);
}

bool StepGraph::recorded() const { return impl_->graph != nullptr; }
void StepGraph::replay() { impl_->graph->replay(); }

#else

struct StepGraph::Impl {};

bool StepGraph::available() { return false; }
void StepGraph::record(const std::function<void()>&) {
  TORCH_CHECK(false, "this build cannot record CUDA graphs: it was made without nvcc");
}
bool StepGraph::recorded() const { return false; }
void StepGraph::replay() { TORCH_CHECK(false, "StepGraph::replay: nothing is recorded"); }

#endif

StepGraph::StepGraph() : impl_(std::make_unique<Impl>()) {}
StepGraph::~StepGraph() = default;

}  // namespace xlstm::train
