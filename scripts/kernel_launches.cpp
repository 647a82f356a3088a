// Prints how every kernel of cuda/ is launched, without a GPU: linked with the host code of cuda/, it stands in for the
// CUDA runtime and writes each launch down instead of carrying it out. Calls the operators over problems that reach every
// kernel, on devices with little, more and most shared memory. One line per launch, for scripts/check_kernels.py:
//   <mangled kernel> <compute capability> <threads> <dynamic shared bytes> <blocks per cluster>
// With XLSTM_HOPPER=0 in the environment the calls on compute capability 9.0 take the kernels for sm_80.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>
#include <utility>

#include "cuda/block_linear/block_linear.h"
#include "cuda/causal_conv1d/causal_conv1d_launch.h"
#include "cuda/gated/gated_recurrence.h"
#include "cuda/linear_int8/linear_int8.h"
#include "cuda/loss/softmax_cross_entropy.h"
#include "cuda/mlstm/mlstm.h"
#include "cuda/mlstm/mlstm_step_inputs.h"
#include "cuda/norm/headwise_norm.h"
#include "cuda/slstm/slstm.h"

namespace {

using xlstm::cuda::DeviceLimits;
using xlstm::cuda::Dtype;
using xlstm::cuda::MlstmProblem;
using xlstm::cuda::View;

std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;
  return names;
}
DeviceLimits device;

/// Bytes of dynamic shared memory that the kernel may have on the device.
int& shared_limit(const void* kernel) {
  static std::map<std::pair<const void*, int>, int> limits;
  return limits.try_emplace({kernel, device.compute_capability}, 48 * 1024).first->second;
}

/// Never read or written: an address that passes for device memory.
void* address(int index) { return reinterpret_cast<void*>((uintptr_t{1} << 40) * (index + 1)); }
template <class T>
T* array(int index) {
  return static_cast<T*>(address(index));
}

View view(int index, const MlstmProblem& p, int64_t width) {
  return {address(index), p.time * p.num_heads * width, p.num_heads * width, width, 1};
}

xlstm::cuda::MlstmInputs inputs(const MlstmProblem& p, bool states) {
  xlstm::cuda::MlstmInputs in;
  in.q = view(0, p, p.dqk);
  in.k = view(1, p, p.dqk);
  in.v = view(2, p, p.dv);
  in.igate = view(3, p, 1);
  in.fgate = view(4, p, 1);
  if (states) {
    in.c0 = array<const float>(5);
    in.n0 = array<const float>(6);
    in.m0 = array<const float>(7);
  }
  return in;
}

void call_chunkwise(const MlstmProblem& p, bool states) {
  xlstm::cuda::MlstmForward forward;
  forward.in = inputs(p, states);
  forward.h = view(8, p, p.dv);
  forward.product = array<float>(9);
  xlstm::cuda::MlstmBackward backward;
  backward.in = forward.in;
  backward.h = forward.h;
  backward.product = forward.product;
  backward.dh = view(10, p, p.dv);
  backward.dq = view(11, p, p.dqk);
  backward.dk = view(12, p, p.dqk);
  backward.dv = view(13, p, p.dv);
  backward.digate = view(14, p, 1);
  backward.dfgate = view(15, p, 1);
  if (states) {
    forward.c = array<float>(16), forward.n = array<float>(17), forward.m = array<float>(18);
    backward.dc = forward.c, backward.dn = forward.n;
    backward.dc0 = array<float>(19), backward.dn0 = array<float>(20);
  }
  xlstm::cuda::mlstm_forward(p, device, forward, address(21), nullptr);
  xlstm::cuda::mlstm_backward(p, device, backward, address(21), nullptr);
}

void call_step(MlstmProblem p) {
  p.time = 1;
  xlstm::cuda::MlstmStep step;
  const xlstm::cuda::MlstmInputs in = inputs(p, false);
  step.q = in.q, step.k = in.k, step.v = in.v, step.igate = in.igate, step.fgate = in.fgate;
  step.h = view(8, p, p.dv);
  step.c = array<float>(5), step.n = array<float>(6), step.m = array<float>(7);
  xlstm::cuda::mlstm_step(p, step, nullptr);
  xlstm::cuda::MlstmRing ring;
  ring.keys = address(9), ring.values = address(10);
  ring.gates = array<float>(11), ring.count = array<int32_t>(12);
  xlstm::cuda::mlstm_step_lazy(p, step, ring, nullptr);
  ++step.c;  // not aligned
  xlstm::cuda::mlstm_step_lazy(p, step, ring, nullptr);
}

/// Blocks of 2, 4 and 8, narrow and wide windows, as many channels as every device holds in float32.
void call_step_inputs(Dtype dtype) {
  for (const int32_t size : {2, 4, 8}) {
    for (const int32_t width : {4, 7}) {
      for (const int32_t channels : {512, 8192}) {
        xlstm::cuda::MlstmStepInputsParams p;
        p.dtype = dtype, p.batch = 16, p.channels = channels, p.num_heads = 4;
        p.width = width, p.block_size = size, p.x = address(0), p.x_batch = 2 * channels;
        p.conv_weight = address(1), p.window = address(2), p.a = address(3);
        p.q = p.k = p.v = {address(4), address(5), address(6)};
        p.igate = p.fgate = {address(7), address(8), address(9)};
        launch_mlstm_step_inputs(p, nullptr);
      }
    }
  }
}

/// Blocks of 2, 4 and 8 by so many.
void call_block_linear(Dtype dtype) {
  for (const int32_t size : {2, 4, 8}) {
    const int64_t channels = 1024;
    const xlstm::cuda::RowView rows{address(0), 65536, channels, 0};
    xlstm::cuda::BlockLinearParams p;
    p.rows = 65536, p.blocks = static_cast<int32_t>(channels / size), p.size = size;
    p.dtype = dtype, p.x = p.y = rows, p.weight = address(1);
    launch_block_linear(p, nullptr);
    xlstm::cuda::BlockLinearGradientParams g;
    g.rows = p.rows, g.blocks = p.blocks, g.size = size, g.dtype = dtype;
    g.x = g.dy = g.dx = rows, g.weight = p.weight;
    g.dweight = address(2), g.dbias = address(3), g.partials = array<float>(4);
    launch_block_linear_gradients(g, nullptr);
  }
}

/// One tile of x and two, rows for one warp and for all.
void call_linear_int8(Dtype dtype) {
  for (const int32_t rows : {1, 16}) {
    for (const int32_t columns : {64, 4096}) {
      xlstm::cuda::LinearInt8Params p;
      p.rows = rows, p.columns = columns, p.out = 4096, p.dtype = dtype;
      p.weight = array<const int8_t>(0), p.x = address(1), p.bias = address(2), p.y = address(3);
      launch_linear_int8(p, nullptr);
    }
  }
}

void call_softmax_cross_entropy(Dtype dtype) {
  xlstm::cuda::SoftmaxCrossEntropyParams p;
  p.rows = 1024, p.vocab = 50304, p.logits = array<const float>(0), p.targets = array<int64_t>(1);
  p.loss = array<float>(2), p.gradient = address(3), p.dtype = dtype;
  launch_softmax_cross_entropy(p, nullptr);
}

/// A single row; narrow heads and rows that need a whole block; odd ones; and wider.
void call_headwise_norm(Dtype dtype) {
  constexpr int32_t kWidest = 6144;  // that registers hold
  for (const int32_t dim : {128, 256, 768, 4096, kWidest, 255, kWidest - 1, 2 * kWidest}) {
    const int32_t heads = dim == 256 ? 4 : 1;
    const int64_t count = dim == 128 ? 1 : 65536;
    const xlstm::cuda::RowView rows{address(0), count, int64_t{heads} * dim, 0};
    xlstm::cuda::HeadwiseNormInputs in;
    in.rows = count, in.heads = heads, in.dim = dim, in.dtype = dtype;
    in.x = in.skip = in.gate = rows, in.x_head = dim;
    in.weight = in.bias = in.skip_weight = {address(1), dtype};
    headwise_norm_forward(xlstm::cuda::HeadwiseNormForward{in, address(2)}, nullptr);
    xlstm::cuda::HeadwiseNormBackward backward;
    backward.in = in, backward.dy = rows;
    backward.dx = address(3), backward.dskip = address(4), backward.dgate = address(5);
    backward.dweight = address(6), backward.dbias = address(7), backward.dskip_weight = address(8);
    backward.partials = array<float>(9);
    headwise_norm_backward(backward, nullptr);
  }
}

void call_all(Dtype dtype) {
  call_headwise_norm(dtype);
  call_block_linear(dtype);
  call_step_inputs(dtype);
  call_linear_int8(dtype);
  call_softmax_cross_entropy(dtype);
  constexpr int64_t kSizes[] = {16, 64, 128, 256, 512};
  for (const int64_t dqk : kSizes) {
    for (const int64_t dv : kSizes) {
      for (const int64_t batch : {1, 128}) {  // few sequences are cut into segments
        for (const bool two_phase : {false, true}) {
          MlstmProblem p;
          p.batch = p.num_sequences = batch;
          p.time = 4096;
          p.num_heads = 4;
          p.dqk = dqk;
          p.dv = dv;
          p.dtype = dtype;
          p.two_phase = two_phase;
          for (const Dtype gates : {Dtype::kFloat32, dtype}) {
            p.igate_dtype = p.fgate_dtype = gates;
            for (const bool sigmoid : {false, true}) {
              p.sigmoid_input_gate = sigmoid;
              p.normalize = !sigmoid;
              call_chunkwise(p, sigmoid);
              call_step(p);
            }
          }
        }
      }
    }
  }
}

/// Channels in 16-byte pieces (1536) and not (1001).
void call_causal_conv1d(Dtype dtype) {
  for (const int32_t channels : {1536, 1001}) {
    for (const int32_t width : {4, 7}) {
      const auto view_of = [&](int index, int64_t time) {
        return xlstm::cuda::ConvView{address(index), time * channels, channels, 1};
      };
      xlstm::cuda::ConvInputs in;
      in.dtype = dtype;
      in.batch = in.num_sequences = 4, in.time = 2048;
      in.parameters.channels = channels, in.parameters.width = width;
      in.parameters.weight = address(0), in.parameters.bias = address(1);
      in.x = view_of(2, in.time), in.state0 = view_of(3, width - 1);
      xlstm::cuda::causal_conv1d_forward({in, view_of(4, in.time), view_of(5, width - 1)}, nullptr);
      xlstm::cuda::ConvBackwardParams backward;
      backward.in = in;
      backward.dy = view_of(6, in.time), backward.dx = view_of(7, in.time);
      backward.dstate0 = view_of(8, width - 1);
      backward.dweight = address(9), backward.dbias = address(10);
      backward.partials = array<float>(11);
      xlstm::cuda::causal_conv1d_backward(backward, nullptr);
      xlstm::cuda::ConvStepParams step;
      step.dtype = dtype, step.batch = 64, step.parameters = in.parameters;
      step.x = view_of(2, 1), step.state = in.state0, step.y = view_of(4, 1);
      xlstm::cuda::causal_conv1d_step(step, nullptr);
    }
  }
}

/// Every number of lanes for a column, decays of rows and of columns.
void call_gated_recurrence() {
  for (const int32_t across : {32, 64, 128, 256, 512, 1024}) {
    xlstm::cuda::GatedRecurrenceParams p;
    p.batch = 16, p.time = 2048, p.num_heads = 4, p.across = across, p.own = 256;
    p.read = array<float>(0), p.write = array<float>(1), p.weight = array<float>(2);
    p.decay = array<float>(3), p.out = array<float>(4);
    for (const bool decays_across : {false, true}) {
      p.decays_across = decays_across;
      gated_recurrence(p, nullptr);
    }
  }
  xlstm::cuda::GatedDecayGradientsParams p;
  p.batch = 16, p.time = 2048, p.num_heads = 4, p.width = 128;
  gated_decay_gradients(p, nullptr);
}

void call_slstm(const xlstm::cuda::SlstmProblem& p) {
  namespace cuda = xlstm::cuda;
  const int64_t units = p.num_heads * p.dh;
  const auto gates_at = [&](int index) {
    return cuda::GateView{address(index), p.time * 4 * units, 4 * units, units, p.dh, 1};
  };
  const View y = {address(2), p.time * units, units, p.dh, 1};
  cuda::SlstmForward forward;
  forward.in.r = address(0);
  forward.wx = gates_at(1), forward.b = address(3), forward.y = y;
  forward.y_last = array<float>(4), forward.c = array<float>(5);
  forward.n = array<float>(6), forward.m = array<float>(7);
  forward.gates = gates_at(8), forward.checkpoints = array<float>(9);
  cuda::SlstmBackward backward;
  backward.in = forward.in, backward.gates = forward.gates,
  backward.checkpoints = forward.checkpoints;
  backward.dy = y, backward.dwx = gates_at(10);
  backward.dy0 = array<float>(11), backward.dc0 = array<float>(12), backward.dn0 = array<float>(13);
  if (cuda::slstm_supported(p, device, false))
    cuda::slstm_forward(p, device, forward, address(14), nullptr);
  if (cuda::slstm_supported(p, device, true))
    cuda::slstm_backward(p, device, backward, address(14), nullptr);
  cuda::SlstmStep step;
  step.product = gates_at(15);
  cuda::slstm_pointwise_forward(p, forward, step, nullptr);
  cuda::slstm_pointwise_backward(p, backward, step, nullptr);
}

void call_slstm(Dtype dtype) {
  using xlstm::cuda::SlstmCell;
  using xlstm::cuda::SlstmExchange;
  for (const SlstmCell cell : {SlstmCell::kSlstm, SlstmCell::kSlstmExpf, SlstmCell::kLstm})
    for (const SlstmExchange exchange : {SlstmExchange::kAuto, SlstmExchange::kBlock,
                                         SlstmExchange::kCluster, SlstmExchange::kGrid})
      for (const int64_t dh : {16, 64, 128, 192, 256, 384, 512, 768, 1024})
        for (const int64_t batch : {1, 16, 128}) {
          xlstm::cuda::SlstmProblem p;
          p.cell = cell, p.exchange = exchange;
          p.batch = p.num_sequences = batch, p.time = 2048, p.num_heads = 4, p.dh = dh;
          p.dtype = p.r_dtype = p.b_dtype = p.gates_dtype = dtype;
          call_slstm(p);
        }
}

CUresult encode_tensor_map(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                           const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                           CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                           CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

}  // namespace

// What the host code of cuda/ uses of the CUDA runtime, and what nvcc's registration code calls.
extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernel_names()[stub] = name;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;  // <<<>>> is not used: prim::launch alone launches
}
char __cudaInitModule(void**) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }

/// The limit is the kernel's, so that a launch of another thread would meet it: it must never fall.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  int& limit = shared_limit(kernel);
  if (bytes < limit) return cudaErrorInvalidValue;
  limit = bytes;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  if (config->dynamicSmemBytes > static_cast<size_t>(shared_limit(kernel)))
    return cudaErrorInvalidValue;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[i].val.clusterDim.x;
  std::printf("%s %d %u %zu %u\n", kernel_names().at(kernel).c_str(), device.compute_capability,
              config->blockDim.x, config->dynamicSmemBytes, cluster);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = device.compute_capability;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cudaErrorNotSupported;  // that and the next: the operators ask, not the launchers
}
cudaError_t cudaOccupancyMaxActiveClusters(int*, const void*, const cudaLaunchConfig_t*) {
  return cudaErrorNotSupported;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "a limit of shared memory that falls or is too low"
                                         : "not supported here";
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"

int main() {
  const char* choice = std::getenv("XLSTM_HOPPER");
  const bool hopper = choice == nullptr || std::string(choice) != "0";
  constexpr DeviceLimits kDevices[] = {
      {80, 108, 163 * 1024}, {86, 84, 99 * 1024}, {90, 132, 227 * 1024}};
  try {
    for (const DeviceLimits& each : kDevices) {
      device = each;
      device.hopper = each.compute_capability == 90 && hopper;
      call_gated_recurrence();
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32}) {
        call_all(dtype);
        call_causal_conv1d(dtype);
        call_slstm(dtype);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compute capability %d: %s\n", device.compute_capability, error.what());
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
