#pragma once
// Problems of the sLSTM kernels: sizes, inputs for kernels and references, wx in any memory order.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/slstm/slstm.h"
#include "tests/reference/slstm_gradients.h"
#include "tests/simt/kernels_support.h"

namespace simt_test {

using reference_real = xlstm::reference::Real;
using xlstm::cuda::DeviceLimits;
using xlstm::cuda::Dtype;
using xlstm::cuda::GateView;
using xlstm::cuda::SlstmCell;
using xlstm::cuda::SlstmExchange;
using xlstm::cuda::SlstmProblem;
using xlstm::reference::SlstmGradients;
using xlstm::reference::SlstmLoss;
using xlstm::reference::SlstmSolution;

/// Where the gate axis of wx lies.
enum class GateOrder {
  kFirst,   ///< (4,B,T,NH,DH)
  kMiddle,  ///< (B,T,4,NH,DH)
  kLast,    ///< (B,T,NH,DH,4)
  kGaps,    ///< (B,T,NH,4,DH) with odd gaps
};

struct Setting {
  SlstmCell cell = SlstmCell::kSlstm;
  int64_t batch = 1, time = 17, heads = 1, dh = 16;
  Dtype dtype = Dtype::kFloat32;
  SlstmExchange exchange = SlstmExchange::kAuto;
  DeviceLimits device = {80, 108, 163 * 1024};
  GateOrder order = GateOrder::kMiddle;
  Dtype gates_dtype = Dtype::kFloat32;
  bool wide_r = false, narrow_b = false;  ///< r in float32, b in `dtype`
  bool rounded_product = false;  ///< y enters the recurrent product in `dtype`, also float16's
  bool states = false, resets = false;
  std::vector<int32_t> packed = {};
  double forget = 1, input = 0, spread = 1;
  bool loss_of_states = true, loss_of_y = true;
  bool same_loss = false;         ///< dy is one number with strides of 0
  bool initial_gradients = true;  ///< those of y0, c0, n0 are wanted
  double slack = 1;               ///< tolerances times so much
  double clip = 0;
  bool cut = false;
  bool recompute = false;  ///< the pre-activations are not kept: computed anew from y

  int64_t sequences() const {
    return packed.empty() ? batch : static_cast<int64_t>(packed.size()) - 1;
  }
  int64_t state_numbers() const { return sequences() * heads * dh; }
  Dtype r_dtype() const { return wide_r ? Dtype::kFloat32 : dtype; }
  Dtype b_dtype() const { return narrow_b ? dtype : Dtype::kFloat32; }
  SlstmProblem problem() const {
    SlstmProblem p;
    p.cell = cell, p.batch = batch, p.time = time, p.num_heads = heads, p.dh = dh;
    p.num_sequences = sequences(), p.exchange = exchange;
    p.dtype = dtype, p.gates_dtype = gates_dtype, p.r_dtype = r_dtype(), p.b_dtype = b_dtype();
    return p;
  }
};

inline float rounded(double x, Dtype dtype) {
  const float value = static_cast<float>(x);
  if (dtype == Dtype::kFloat32) return value;
  return dtype == Dtype::kBFloat16 ? prim::bf16_to_float(prim::float_to_bf16(value))
                                   : prim::f16_to_float(prim::float_to_f16(value));
}

/// (B,T,4,NH,DH) numbers of any type. Memory between them is NaN and must stay so.
class GateTensor {
 public:
  GateTensor(const Setting& setting, Dtype dtype, GateOrder order) : s(setting), type(dtype) {
    const int64_t gap = order == GateOrder::kGaps ? 3 : 0;
    if (order == GateOrder::kMiddle)
      view = {nullptr, 0, 4 * s.heads * s.dh, s.heads * s.dh, s.dh, 1};
    if (order == GateOrder::kLast) view = {nullptr, 0, 4 * s.heads * s.dh, 1, 4 * s.dh, 4};
    if (order == GateOrder::kFirst) view = {nullptr, 0, s.heads * s.dh, 0, s.dh, 1};
    if (order == GateOrder::kGaps)
      view = {nullptr, 0, s.heads * 4 * (s.dh + gap), s.dh + gap, 4 * (s.dh + gap), 1};
    view.batch = s.time * view.time + gap;
    if (order == GateOrder::kFirst) view.gate = s.batch * view.batch;
    const int64_t numbers = s.batch * s.time * 4 * s.heads * (s.dh + gap) + s.batch * gap;
    memory.assign(static_cast<size_t>(numbers * bytes()) + 32, 0xff);
    used.assign(memory.size(), false);
    while (reinterpret_cast<uintptr_t>(&memory[first]) % 16 != 0) ++first;
    view.data = &memory[first];
  }
  GateTensor(const GateTensor&) = delete;
  GateTensor& operator=(const GateTensor&) = delete;

  void set(const Numbers& values) {  // in the order (B,T,4,NH,DH)
    for_each([&](size_t i, size_t at) {
      if (type == Dtype::kFloat32) {
        reinterpret_cast<float*>(&memory[first])[at] = static_cast<float>(values[i]);
      } else {
        const auto x = static_cast<float>(values[i]);
        reinterpret_cast<uint16_t*>(&memory[first])[at] =
            type == Dtype::kBFloat16 ? prim::float_to_bf16(x) : prim::float_to_f16(x);
      }
    });
  }
  Numbers get() {
    Numbers out;
    for_each([&](size_t, size_t at) {
      if (type == Dtype::kFloat32) {
        out.push_back(static_cast<double>(reinterpret_cast<const float*>(&memory[first])[at]));
      } else {
        const uint16_t bits = reinterpret_cast<const uint16_t*>(&memory[first])[at];
        out.push_back(static_cast<double>(type == Dtype::kBFloat16 ? prim::bf16_to_float(bits)
                                                                   : prim::f16_to_float(bits)));
      }
    });
    return out;
  }
  void expect_gaps_untouched() const {
    for (size_t i = 0; i < memory.size(); ++i)
      if (!used[i]) expect(memory[i] == 0xff, "written outside of wx or dwx", static_cast<long>(i));
  }

  GateView view;

 private:
  int64_t bytes() const { return type == Dtype::kFloat32 ? 4 : 2; }
  template <class F>
  void for_each(F f) {
    size_t i = 0;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t t = 0; t < s.time; ++t)
        for (int64_t g = 0; g < 4; ++g)
          for (int64_t h = 0; h < s.heads; ++h)
            for (int64_t u = 0; u < s.dh; ++u) {
              const auto at = static_cast<size_t>(b * view.batch + t * view.time + g * view.gate +
                                                  h * view.head + u * view.unit);
              const auto width = static_cast<size_t>(bytes());
              for (size_t k = 0; k < width; ++k) used[first + at * width + k] = true;
              f(i++, at);
            }
  }

  const Setting& s;
  Dtype type;
  std::vector<unsigned char> memory;
  std::vector<bool> used;
  size_t first = 0;
};

/// Numbers of a type, contiguous.
inline std::vector<unsigned char> stored(const Numbers& values, Dtype dtype) {
  const size_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  std::vector<unsigned char> out(values.size() * bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto x = static_cast<float>(values[i]);
    if (dtype == Dtype::kFloat32) {
      reinterpret_cast<float*>(out.data())[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(out.data())[i] =
          dtype == Dtype::kBFloat16 ? prim::float_to_bf16(x) : prim::float_to_f16(x);
    }
  }
  return out;
}

inline const char* name_of(SlstmCell cell) {
  return cell == SlstmCell::kSlstm       ? "slstm"
         : cell == SlstmCell::kSlstmExpf ? "slstm_expf"
                                         : "lstm";
}

/// A problem with its inputs, as the kernels and as the references take them.
struct Data {
  Data(const Setting& setting, uint64_t seed)
      : s(setting),
        random(static_cast<unsigned>(1000 * seed + s.dh * 7 + s.time)),
        wx(s, s.dtype, s.order) {
    input.cell = name_of(s.cell);
    input.batch = s.batch, input.time = s.time, input.heads = s.heads, input.dh = s.dh;
    fill_gates();
    const double scale = 1 / std::sqrt(static_cast<double>(s.dh));
    r = stored(fill(input.r, 4 * s.heads * s.dh * s.dh, 0, scale, s.r_dtype()), s.r_dtype());
    b = stored(fill(input.b, 4 * s.heads * s.dh, 0, 0.3, s.b_dtype()), s.b_dtype());
    if (s.states) {
      const auto state = [&](std::vector<reference_real>& to, double mean, double spread) {
        const Numbers values = fill(to, s.state_numbers(), mean, spread, Dtype::kFloat32);
        return std::vector<float>(values.begin(), values.end());
      };
      y0 = state(input.y0, 0, 0.5), c0 = state(input.c0, 0, 0.5);
      n0 = state(input.n0, 1.5, 0.1), m0 = state(input.m0, 0, 0.5);
    }
    fill_resets();
    input.cu_seqlens.assign(s.packed.begin(), s.packed.end());
  }
  Data(const Data&) = delete;
  Data& operator=(const Data&) = delete;

  Numbers fill(std::vector<reference_real>& to, int64_t count, double mean, double spread,
               Dtype dtype) {
    std::normal_distribution<double> normal(mean, spread);
    Numbers values;
    for (int64_t i = 0; i < count; ++i)
      values.push_back(static_cast<double>(rounded(normal(random), dtype)));
    to.assign(values.begin(), values.end());
    return values;
  }
  void fill_gates() {
    Numbers values;
    std::normal_distribution<double> normal(0, s.spread);
    for (int64_t i = 0; i < s.batch * s.time; ++i)
      for (int gate = 0; gate < 4; ++gate)
        for (int64_t u = 0; u < s.heads * s.dh; ++u) {
          const double mean = gate == 0 ? s.input : gate == 1 ? s.forget : 0;
          values.push_back(static_cast<double>(rounded(mean + normal(random), s.dtype)));
        }
    input.wx.assign(values.begin(), values.end());
    wx.set(values);
  }
  /// In memory (T,B), to have strides of its own.
  void fill_resets() {
    if (!s.resets) return;
    reset.assign(static_cast<size_t>(s.batch * s.time), 0);
    input.reset.assign(reset.size(), 0);
    for (int64_t i = 0; i < s.batch; ++i)
      for (int64_t t = 0; t < s.time; ++t) {
        const bool here = (t + 3 * i) % 7 == 0 || t == 16 || t == 15;
        reset[static_cast<size_t>(t * s.batch + i)] = here;
        input.reset[static_cast<size_t>(i * s.time + t)] = here;
      }
  }
  xlstm::cuda::SlstmInputs inputs() const {
    xlstm::cuda::SlstmInputs in;
    in.r = r.data();
    if (s.states) in.y0 = y0.data(), in.c0 = c0.data(), in.n0 = n0.data();
    if (s.resets) {
      in.reset = reinterpret_cast<const bool*>(reset.data());
      in.reset_batch = 1, in.reset_time = s.batch;
    }
    if (!s.packed.empty()) in.cu_seqlens = s.packed.data();
    return in;
  }

  const Setting& s;
  std::mt19937 random;
  GateTensor wx;
  xlstm::reference::SlstmProblem input;
  std::vector<unsigned char> r, b, reset;
  std::vector<float> y0, c0, n0, m0;
};

}  // namespace simt_test
