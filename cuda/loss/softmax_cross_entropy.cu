// A block walks over its row twice: for the largest logit and the sum of exponentials, then for the gradient.
#include "cuda/loss/softmax_cross_entropy.h"

#include "cuda/pieces.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kLog2E = 1.44269504F, kLn2 = 0.693147181F;

/// Of some logits, in units of log2: the largest, and the sum of 2^(x - largest).
struct Mass {
  float peak = -3e38F, sum = 0;
};

DEVICE_FUNCTION Mass together(const Mass& a, const Mass& b) {
  const float peak = fmaxf(a.peak, b.peak);
  return {peak, a.sum * prim::ex2(a.peak - peak) + b.sum * prim::ex2(b.peak - peak)};
}

DEVICE_FUNCTION Mass shuffled(const Mass& mass, u32 lanes) {
  return {prim::float_of(prim::shfl_xor(prim::bits_of(mass.peak), lanes)),
          prim::float_of(prim::shfl_xor(prim::bits_of(mass.sum), lanes))};
}

/// The capped logit in units of log2, and how fast it grows with the logit.
struct Capped {
  float value, slope;
};

class RowBlock {
 public:
  struct Shared {
    Mass parts[kWarps];
  };

  DEVICE_FUNCTION RowBlock(const SoftmaxCrossEntropyParams& params, Shared& shared)
      : p(params),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        row(prim::block_idx().x),
        logits(params.logits + row * params.vocab),
        vector(params.vocab % 4 == 0) {}

  DEVICE_FUNCTION void run() {
    const int64_t target = p.targets[row];
    const bool ignored = target == p.ignore_index;
    const bool known = target >= 0 && target < p.vocab;
    float log_sum = 0;
    if (!ignored) {
      const Mass mass = total();
      log_sum = mass.peak + log2f(mass.sum);
    }
    if (thread == 0) {
      float loss = ignored ? 0.0F : prim::float_of(0x7fc00000U);
      if (!ignored && known) loss = (log_sum - capped(logits[target]).value) * kLn2;
      p.loss[row] = loss;
    }
    if (p.gradient == nullptr) return;
    prim::sync_block();  // the target's logit has been read
    float scale = p.scale == nullptr ? 1.0F : *p.scale;
    if (p.row_scales != nullptr) scale *= p.row_scales[row];
    if (!ignored && !known) scale = prim::float_of(0x7fc00000U);
    write_gradient(ignored, target, log_sum, scale);
  }

 private:
  DEVICE_FUNCTION Capped capped(float x) const {
    if (p.soft_cap <= 0) return {x * kLog2E, 1.0F};
    const float t = tanhf(x / p.soft_cap);
    return {p.soft_cap * t * kLog2E, 1.0F - t * t};
  }

  DEVICE_FUNCTION Mass total() const {
    Mass mass;
    if (vector) {
      for (int64_t i = 4 * thread; i < p.vocab; i += 4 * kThreads) {
        Piece<float> four;
        four.load(logits, i);
        float values[4], peak = mass.peak;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j] = capped(four[j]).value;
          peak = larger(peak, values[j]);
        }
        mass.sum *= prim::ex2(mass.peak - peak);
        mass.peak = peak;
#pragma unroll
        for (int j = 0; j < 4; ++j) mass.sum += prim::ex2(values[j] - peak);
      }
    } else {
      for (int64_t i = thread; i < p.vocab; i += kThreads)
        mass = together(mass, {larger(-3e38F, capped(logits[i]).value), 1});
    }
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) mass = together(mass, shuffled(mass, lanes));
    if (thread % 32 == 0) s.parts[thread / 32] = mass;
    prim::sync_block();
    mass = s.parts[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) mass = together(mass, s.parts[warp]);
    return mass;
  }

  /// NaN wins, so that it reaches the loss.
  static DEVICE_FUNCTION float larger(float a, float b) { return b > a || b != b ? b : a; }

  DEVICE_FUNCTION float slope(int64_t i, float logit, int64_t target, float log_sum,
                              float scale) const {
    const Capped c = capped(logit);
    const float share = prim::ex2(c.value - log_sum) - (i == target ? 1.0F : 0.0F);
    return share * c.slope * scale;
  }

  DEVICE_FUNCTION void write_gradient(bool ignored, int64_t target, float log_sum,
                                      float scale) const {
    const int64_t first = row * p.vocab;
    if (!vector || p.vocab % 8 != 0) {
      for (int64_t i = thread; i < p.vocab; i += kThreads)
        store_number(p.gradient, first + i, p.dtype,
                     ignored ? 0.0F : slope(i, logits[i], target, log_sum, scale));
      return;
    }
    for (int64_t i = 8 * thread; i < p.vocab; i += 8 * kThreads) {
      float values[8] = {};
      if (!ignored) {
        load_eight(logits, i, Dtype::kFloat32, values);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = slope(i + j, values[j], target, log_sum, scale);
      }
      store_eight(p.gradient, first + i, p.dtype, values);
    }
  }

  const SoftmaxCrossEntropyParams& p;
  Shared& s;
  const int thread;
  const int64_t row;
  const float* const logits;
  const bool vector;  // rows begin at 16 bytes
};

KERNEL_FUNCTION(kThreads, 4)
softmax_cross_entropy(const GRID_CONSTANT SoftmaxCrossEntropyParams p) {
  RowBlock(p, *reinterpret_cast<RowBlock::Shared*>(prim::dynamic_shared())).run();
}

}  // namespace

void launch_softmax_cross_entropy(const SoftmaxCrossEntropyParams& params, Stream stream) {
  if (params.vocab == 0) return;
  prim::launch("softmax_cross_entropy", softmax_cross_entropy,
               {static_cast<u32>(params.rows), kThreads, sizeof(RowBlock::Shared)}, params, stream);
}

}  // namespace xlstm::cuda
