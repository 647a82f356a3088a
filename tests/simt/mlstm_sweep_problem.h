#pragma once
// A problem for the sweep kernels alone. Gate records, G and z come from plain loops here and not from the other kernels;
// the states that enter segments come from the recurrence in float64.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_chunks.cuh"
#include "tests/reference/mlstm_reference.h"
#include "tests/simt/cases.h"

namespace simt_test::sweep {

using namespace xlstm::cuda;
using xlstm::reference::MlstmInput;
using Numbers = std::vector<double>;

inline const DeviceLimits kAmpere{80, 108, 163 * 1024};
inline const DeviceLimits kSmall{86, 82, 99 * 1024};  // one stage where two do not fit
inline const DeviceLimits kHopper{90, 132, 227 * 1024};
inline const DeviceLimits kTiny{80, 1, 64 * 1024};  // one stage even of the smallest tile

enum class Order { kDense, kAligned, kUnaligned, kInner };

struct Setting {
  const char* name;
  int64_t time, dqk, dv;
  Dtype dtype = Dtype::kBFloat16;
  int64_t batch = 1, heads = 1;
  int32_t segments = 1;
  bool sigmoid = false, normalize = true, states = false, resets = false;
  Order order = Order::kDense;
  std::vector<int32_t> packed = {};
  double input = -1, forget = 3, spread = 1;
  double key_mean = 0;  ///< of q and k
  DeviceLimits device = kAmpere;
  int32_t chunk = 64;  ///< tokens

  int64_t sequences() const {
    return packed.empty() ? batch : static_cast<int64_t>(packed.size()) - 1;
  }
  int64_t begin(int64_t sequence) const { return packed.empty() ? 0 : packed[sequence]; }
  int64_t length(int64_t sequence) const {
    return packed.empty() ? time : packed[sequence + 1] - packed[sequence];
  }
  float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(dqk))); }
};

/// A (B,T,NH,D) tensor. Memory outside its numbers is NaN and must stay so.
class Tensor {
 public:
  Tensor(const Setting& s, int64_t width, Dtype dtype)
      : s_(s), bytes_(dtype == Dtype::kFloat32 ? 4 : 2) {
    operand.width = static_cast<int32_t>(width);
    operand.dtype = dtype;
    operand.inner = s.order == Order::kInner ? 2 : 1;
    const int64_t row =
        s.order == Order::kUnaligned ? width + 3 : (width * operand.inner + 15) / 8 * 8;
    if (s.order == Order::kDense) {
      operand.head = width;
      operand.time = s.heads * width;
      operand.batch = s.time * operand.time;
    } else {  // (B,NH,T,D) with gaps
      operand.time = row;
      operand.head = s.time * row;
      operand.batch = s.heads * operand.head + (s.order == Order::kUnaligned ? 1 : 8);
    }
    memory_.resize(static_cast<size_t>(s.batch * operand.batch * bytes_) + 16, 0xff);
    auto* base = memory_.data();
    while (reinterpret_cast<uintptr_t>(base) % 16 != 0) ++base;
    operand.data = base;
    operand.vector = operand.inner == 1;
    for (const int64_t stride : {operand.batch, operand.time, operand.head})
      if (stride * bytes_ % 16 != 0) operand.vector = false;
  }
  void set(int64_t b, int64_t t, int64_t h, int64_t d, double value) {
    const int64_t i = at(b, t, h, d);
    const auto x = static_cast<float>(value);
    if (bytes_ == 4) {
      static_cast<float*>(operand.data)[i] = x;
    } else {
      static_cast<uint16_t*>(operand.data)[i] =
          operand.dtype == Dtype::kBFloat16 ? prim::float_to_bf16(x) : prim::float_to_f16(x);
    }
  }
  double get(int64_t b, int64_t t, int64_t h, int64_t d) const {
    const int64_t i = at(b, t, h, d);
    if (bytes_ == 4) return static_cast<const float*>(operand.data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(operand.data)[i];
    return operand.dtype == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
  }
  void fill(std::mt19937& random, double mean) {
    std::normal_distribution<double> normal(mean, 1);
    const int64_t used = s_.packed.empty() ? s_.time : s_.packed.back();  // the rest stays NaN
    for (int64_t b = 0; b < s_.batch; ++b)
      for (int64_t t = 0; t < used; ++t)
        for (int64_t h = 0; h < s_.heads; ++h)
          for (int64_t d = 0; d < operand.width; ++d) set(b, t, h, d, normal(random));
  }
  Numbers rows(int64_t sequence, int64_t head) const {
    const int64_t b = s_.packed.empty() ? sequence : 0;
    Numbers out;
    for (int64_t t = 0; t < s_.length(sequence); ++t)
      for (int64_t d = 0; d < operand.width; ++d)
        out.push_back(get(b, s_.begin(sequence) + t, head, d));
    return out;
  }
  /// Bytes that are not NaN: a kernel that stores outside the tensor raises the number.
  int64_t bytes_written() const {
    return static_cast<int64_t>(memory_.size()) -
           std::count(memory_.begin(), memory_.end(), static_cast<unsigned char>(0xff));
  }

  Operand operand;

 private:
  int64_t at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return b * operand.batch + t * operand.time + h * operand.head + d * operand.inner;
  }
  const Setting& s_;
  int64_t bytes_;
  std::vector<unsigned char> memory_;
};

/// Relative error in the 2-norm over all that was added; NaN and infinities fail at once.
class Difference {
 public:
  explicit Difference(const char* name) : name_(name) {}
  void add(double got, double wanted) { add(got, wanted, 0); }
  /// `square`: what the number's square counts for, where it is a sum of terms that may cancel: at least the sum of their squares.
  void add(double got, double wanted, double square) {
    expect(std::isfinite(got), name_, count_++);
    wrong_ += (got - wanted) * (got - wanted);
    size_ += std::max(square, wanted * wanted);
  }
  template <class Got>
  void add(const std::vector<Got>& got, int64_t first, const Numbers& wanted) {
    for (size_t i = 0; i < wanted.size(); ++i) add(got[static_cast<size_t>(first) + i], wanted[i]);
  }
  void check(double tolerance) const {
    if (std::sqrt(wrong_) > tolerance * std::sqrt(size_) + 1e-30)
      throw Mismatch(std::string("wrong values: ") + name_ + ", relative error " +
                     std::to_string(std::sqrt(wrong_ / size_)));
  }

 private:
  const char* name_;
  double wrong_ = 0, size_ = 0;
  long count_ = 0;
};

inline double log_sigmoid(double x) {
  return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x)));
}

/// One head of one sequence: what the recurrence says, and the kernel's inputs that are made of it.
struct Head {
  MlstmInput in;
  Numbers h, norm, dh;
  Numbers product, m;  // (T)
  Numbers c_end, n_end, dc_end, dn_end;
  xlstm::reference::MlstmGradients gradients;
  xlstm::reference::MlstmGradients direct;  // those of the numerator alone: N held constant

  /// The sequence from token `begin` to `end`, with the state that `begin` starts from.
  MlstmInput part(int64_t begin, int64_t end, const Numbers& c, const Numbers& n, double m0) const {
    MlstmInput p = in;
    p.length = end - begin;
    const auto cut = [&](const Numbers& x, int64_t width) {
      return Numbers(x.begin() + begin * width, x.begin() + end * width);
    };
    p.q = cut(in.q, in.dqk), p.k = cut(in.k, in.dqk), p.v = cut(in.v, in.dv);
    p.igate = cut(in.igate, 1), p.fgate = cut(in.fgate, 1);
    p.reset.assign(in.reset.begin() + begin, in.reset.begin() + end);
    p.c0 = c, p.n0 = n, p.m0 = m0;
    return p;
  }
  /// scale q_t . n_t and m_t
  void follow_normaliser() {
    Numbers n = in.n0;
    double before = in.sigmoid_input_gate ? 0 : in.m0;
    for (int64_t t = 0; t < in.length; ++t) {
      if (in.reset[t]) n.assign(n.size(), 0), before = 0;
      const double f = log_sigmoid(in.fgate[t]) + before;
      const double i = in.sigmoid_input_gate ? log_sigmoid(in.igate[t]) : in.igate[t];
      const double now = in.sigmoid_input_gate ? 0 : std::max(f, i);
      double sum = 0;
      for (int64_t d = 0; d < in.dqk; ++d) {
        n[d] = std::exp(f - now) * n[d] + std::exp(i - now) * in.k[t * in.dqk + d];
        sum += in.scale * in.q[t * in.dqk + d] * n[d];
      }
      product.push_back(sum);
      m.push_back(before = now);
    }
  }
  double floor_at(int64_t t) const { return std::exp(std::clamp(-m[t], -87.0, 80.0)); }
  /// Gradient of the normaliser's product: -<dh, h> / N through |product|.
  double z_at(int64_t t) const {
    if (!in.normalize || std::fabs(product[t]) <= floor_at(t)) return 0;
    double sum = 0;
    for (int64_t j = 0; j < in.dv; ++j) sum += dh[t * in.dv + j] * h[t * in.dv + j];
    return (product[t] < 0 ? sum : -sum) / norm[t];
  }
};

inline void split(double x, float& high, float& rest) {
  high = static_cast<float>(x);
  rest = static_cast<float>(x - high);
}

/// Records and gammas of a head's chunks, from the definitions at the top of mlstm_params.h.
inline void fill_records(const Head& head, int64_t length, GateRecord* records, float* gamma) {
  const MlstmInput& in = head.in;
  const double ln2 = std::log(2.0);
  for (int64_t first = 0; first < in.length; first += length) {
    const int64_t count = std::min<int64_t>(length, in.length - first);
    double m_before = in.sigmoid_input_gate ? 0 : first == 0 ? in.m0 : head.m[first - 1];
    const double m_enters = m_before;
    Numbers b(count), alpha(count), peak(count);
    std::vector<int> start(count);
    for (int64_t t = 0; t < count; ++t) {
      const bool reset = in.reset[first + t];
      if (reset) m_before = 0;
      const double li =
          in.sigmoid_input_gate ? log_sigmoid(in.igate[first + t]) : in.igate[first + t];
      start[t] = reset ? static_cast<int>(t) : t == 0 ? 0 : start[t - 1];
      b[t] = log_sigmoid(in.fgate[first + t]) + (reset || t == 0 ? 0 : b[t - 1]);
      alpha[t] = li - b[t];
      peak[t] = in.sigmoid_input_gate
                    ? -b[t]
                    : std::max(reset || t == 0 ? m_before : peak[t - 1], alpha[t]);
    }
    const auto reset_until = [&](int64_t t) { return start[t] > 0 || in.reset[first]; };
    for (int64_t t = 0; t < length; ++t) {
      GateRecord& r = records[first + t];
      r = {-1e38F, 0, 0, 0, 0, 0, 1, static_cast<int32_t>(length)};
      if (t >= count) continue;
      split(alpha[t] / ln2, r.alpha, r.alpha_rest);
      split(peak[t] / ln2, r.peak, r.peak_rest);
      r.w = reset_until(t) ? 0 : static_cast<float>(in.scale * std::exp(m_enters - peak[t]));
      r.u = t < start[count - 1] ? 0 : static_cast<float>(std::exp(alpha[t] - peak[count - 1]));
      r.floor = static_cast<float>(in.sigmoid_input_gate ? 1 : head.floor_at(first + t));
      r.start = start[t];
    }
    gamma[first / length] =
        reset_until(count - 1) ? 0 : static_cast<float>(std::exp(m_enters - peak[count - 1]));
  }
}

/// Everything the four launches read and write.
struct Problem {
  Problem(const Setting& setting, uint64_t seed)
      : s(setting),
        q(s, s.dqk, s.dtype),
        k(s, s.dqk, s.dtype),
        v(s, s.dv, s.dtype),
        g(s, s.dv, s.dtype == Dtype::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32) {
    std::mt19937 random(static_cast<unsigned>(100 * seed + s.time + s.dqk + s.dv));
    for (Tensor* x : {&q, &k}) x->fill(random, s.key_mean);
    for (Tensor* x : {&v, &g}) x->fill(random, 0);
    chunks.num_sequences = static_cast<int32_t>(s.sequences());
    chunks.num_heads = static_cast<int32_t>(s.heads);
    chunks.time = static_cast<int32_t>(s.time);
    chunks.length = s.chunk;
    chunks.segments = s.segments;
    if (!s.packed.empty()) chunks.cu_seqlens = s.packed.data();
    chunks.slots = s.packed.empty() ? chunks.num_sequences * divide_up(chunks.time, s.chunk)
                                    : chunks.time / s.chunk + chunks.num_sequences;
    const int64_t slots = s.heads * chunks.slots;
    records.assign(slots * s.chunk, {NAN, NAN, NAN, NAN, NAN, NAN, NAN, 0});
    z.assign(slots * s.chunk, 0);
    gamma.assign(slots, NAN);
    const int64_t items = s.sequences() * s.heads;
    for (std::vector<float>* x : {&start_c, &start_dc})
      x->assign(items * s.segments * s.dqk * s.dv, NAN);
    for (std::vector<float>* x : {&start_n, &start_dn}) x->assign(items * s.segments * s.dqk, NAN);
    for (int64_t item = 0; item < items; ++item) add_head(item, random);
  }

  void add_head(int64_t item, std::mt19937& random) {
    std::normal_distribution<double> normal(0, 1);
    const int64_t sequence = item / s.heads, head = item % s.heads;
    Head& x = heads.emplace_back();
    MlstmInput& in = x.in;
    in.length = s.length(sequence), in.dqk = s.dqk, in.dv = s.dv;
    in.q = q.rows(sequence, head), in.k = k.rows(sequence, head), in.v = v.rows(sequence, head);
    for (int64_t t = 0; t < in.length; ++t) {
      in.igate.push_back(static_cast<float>(s.input + s.spread * normal(random)));
      in.fgate.push_back(static_cast<float>(s.forget + s.spread * normal(random)));
      const int64_t at = s.begin(sequence) + t;
      in.reset.push_back(s.resets && (at % 37 == 5 || at % 37 == 6 || at % 128 == 64));
    }
    const auto state = [&](int64_t size) {
      Numbers numbers(size);
      if (s.states)
        for (double& n : numbers) n = static_cast<float>(0.5 * normal(random));
      return numbers;
    };
    in.c0 = state(s.dqk * s.dv), in.n0 = state(s.dqk);
    in.m0 = s.states ? 0.3 : 0;
    in.sigmoid_input_gate = s.sigmoid, in.normalize = s.normalize;
    in.scale = s.scale(), in.eps = 1e-6F;
    x.dc_end = state(s.dqk * s.dv), x.dn_end = state(s.dqk);
    const auto out = mlstm_forward(in);
    x.h = out.h, x.norm = out.norm, x.c_end = out.c, x.n_end = out.n;
    // G = dh / N has the numbers of the kernels' input exactly.
    x.dh = g.rows(sequence, head);
    for (size_t i = 0; i < x.dh.size(); ++i) x.dh[i] *= x.norm[i / static_cast<size_t>(s.dv)];
    MlstmInput constant_norm = in;
    constant_norm.normalize = false;
    x.direct = mlstm_backward(constant_norm, g.rows(sequence, head), x.dc_end, x.dn_end);
    x.gradients = mlstm_backward(in, x.dh, x.dc_end, x.dn_end);
    x.follow_normaliser();
    add_gates(item);
    add_starts(item);
  }

  void add_gates(int64_t item) {
    const int64_t sequence = item / s.heads, head = item % s.heads;
    const Head& x = heads[item];
    const int64_t slot =
        head * chunks.slots + sequence_at(chunks, static_cast<int32_t>(sequence)).first_slot;
    fill_records(x, s.chunk, &records[slot * s.chunk], &gamma[slot]);
    for (int64_t t = 0; t < x.in.length; ++t) z[slot * s.chunk + t] = static_cast<float>(x.z_at(t));
  }

  /// The states that enter the segments from the left and their gradients that enter from the right.
  void add_starts(int64_t item) {
    const Head& x = heads[item];
    const SequenceRange range = sequence_at(chunks, static_cast<int32_t>(item / s.heads));
    for (int32_t i = 0; i < s.segments; ++i) {
      const SegmentRange segment = segment_at(chunks, range, i);
      const int64_t begin = std::min<int64_t>(s.chunk * segment.begin, x.in.length);
      const int64_t end = std::min<int64_t>(s.chunk * segment.end, x.in.length);
      const auto left = mlstm_forward(x.part(0, begin, x.in.c0, x.in.n0, x.in.m0));
      const auto middle = mlstm_forward(x.part(0, end, x.in.c0, x.in.n0, x.in.m0));
      const auto right =
          mlstm_backward(x.part(end, x.in.length, middle.c, middle.n, middle.m),
                         Numbers(x.dh.begin() + end * s.dv, x.dh.end()), x.dc_end, x.dn_end);
      const int64_t at = item * s.segments + i;
      std::copy(left.c.begin(), left.c.end(), start_c.begin() + at * s.dqk * s.dv);
      std::copy(left.n.begin(), left.n.end(), start_n.begin() + at * s.dqk);
      std::copy(right.c0.begin(), right.c0.end(), start_dc.begin() + at * s.dqk * s.dv);
      std::copy(right.n0.begin(), right.n0.end(), start_dn.begin() + at * s.dqk);
    }
  }

  const Setting& s;
  Tensor q, k, v, g;
  Chunks chunks;
  std::vector<GateRecord> records;
  std::vector<float> gamma, z, start_c, start_n, start_dc, start_dn;
  std::vector<Head> heads;
};

}  // namespace simt_test::sweep
