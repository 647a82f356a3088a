// The state and out kernels of the mLSTM against the recurrence in float64; gate records, G and z are computed here.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/prim.h"
#include "tests/reference/mlstm_reference.h"
#include "tests/simt/cases.h"

namespace simt_test {
namespace {

using namespace xlstm::cuda;  // NOLINT(google-build-using-namespace)
using xlstm::reference::MlstmGradients;
using xlstm::reference::MlstmInput;
using xlstm::reference::MlstmOutput;

const DeviceLimits kAmpere{80, 108, 163 * 1024};  // two stages
const DeviceLimits kSmall{86, 80, 99 * 1024};     // three with one plane, two with two
const DeviceLimits kLarge{90, 132, 227 * 1024};   // likewise

struct Setting {
  const char* name = "";
  int64_t time = 1, dqk = 16, dv = 16, batch = 1, heads = 1;
  int length = 64, segments = 1;
  Dtype dtype = Dtype::kBFloat16;
  bool sigmoid = false, normalize = true, states = false, resets = false, strided = false;
  std::vector<int32_t> packed = {};  // cu_seqlens
  double forget_mean = 3, input_mean = -1, gate_spread = 1.5;
  DeviceLimits device = kAmpere;
};

/// A (B,T,NH,D) tensor, dense or with unaligned rows, gaps and heads before time; unwritten bytes are 0xff.
class Tensor {
 public:
  Tensor(const Setting& s, int64_t width, Dtype dtype, bool dense)
      : s_(s), width_(width), bytes_(dtype == Dtype::kFloat32 ? 4 : 2) {
    operand.width = static_cast<int32_t>(width);
    operand.dtype = dtype;
    operand.head = dense ? width : s.time * (2 * width + 3) + 1;
    operand.time = dense ? s.heads * width : 2 * width + 3;
    operand.inner = dense ? 1 : 2;
    operand.batch = dense ? s.time * operand.time : s.heads * operand.head;
    operand.vector = dense && width * bytes_ % 16 == 0;
    memory_.assign(static_cast<size_t>(s.batch * operand.batch * bytes_), 0xff);
    operand.data = memory_.data();
  }
  void set(int64_t b, int64_t t, int64_t h, int64_t d, double x) {
    const auto value = static_cast<float>(x);
    if (bytes_ == 4) {
      reinterpret_cast<float*>(memory_.data())[index(b, t, h, d)] = value;
    } else {
      reinterpret_cast<uint16_t*>(memory_.data())[index(b, t, h, d)] =
          operand.dtype == Dtype::kBFloat16 ? prim::float_to_bf16(value)
                                            : prim::float_to_f16(value);
    }
  }
  double get(int64_t b, int64_t t, int64_t h, int64_t d) const {
    if (bytes_ == 4) return reinterpret_cast<const float*>(memory_.data())[index(b, t, h, d)];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(memory_.data())[index(b, t, h, d)];
    return operand.dtype == Dtype::kBFloat16 ? prim::bf16_to_float(bits) : prim::f16_to_float(bits);
  }
  template <class F>
  void each(F f) {
    for (int64_t b = 0; b < s_.batch; ++b)
      for (int64_t t = 0; t < s_.time; ++t)
        for (int64_t h = 0; h < s_.heads; ++h)
          for (int64_t d = 0; d < width_; ++d) f(b, t, h, d);
  }
  void fill(std::mt19937& random, double mean) {
    std::normal_distribution<double> normal(mean, 1);
    each([&](auto... at) { set(at..., normal(random)); });
  }
  std::vector<double> rows(int64_t b, int64_t begin, int64_t length, int64_t h) const {
    std::vector<double> out;
    for (int64_t t = begin; t < begin + length; ++t)
      for (int64_t d = 0; d < width_; ++d) out.push_back(get(b, t, h, d));
    return out;
  }
  /// Nothing but the numbers themselves was written.
  void expect_gaps_untouched(const char* name) {
    std::vector<unsigned char> left = memory_;
    each([&](auto... at) { std::fill_n(&left[index(at...) * bytes_], bytes_, 0xff); });
    for (const unsigned char byte : left) expect(byte == 0xff, name, -2);
  }

  Operand operand;

 private:
  size_t index(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return static_cast<size_t>(b * operand.batch + t * operand.time + h * operand.head +
                               d * operand.inner);
  }
  const Setting& s_;
  int64_t width_;
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

/// Relative error in the 2-norm; `size`: what an element's error is relative to.
class Difference {
 public:
  explicit Difference(const char* name) : name_(name) {}
  void add(double got, double wanted, double size) {
    expect(std::isfinite(got), name_, count_++);
    wrong_ += (got - wanted) * (got - wanted);
    size_ += size * size;
  }
  void add(const std::vector<double>& got, const std::vector<double>& wanted) {
    expect(got.size() == wanted.size(), name_);
    for (size_t i = 0; i < got.size(); ++i) add(got[i], wanted[i], wanted[i]);
  }
  void check(double tolerance, const char* setting) const {
    if (std::sqrt(wrong_) <= tolerance * std::sqrt(size_) + 1e-30) return;
    throw Mismatch(std::string("wrong values: ") + setting + ": " + name_ + ", relative error " +
                   std::to_string(std::sqrt(wrong_ / size_)));
  }

 private:
  const char* name_;
  double wrong_ = 0, size_ = 0;
  long count_ = 0;
};

double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

std::vector<double> slice(const std::vector<float>& all, int64_t begin, int64_t count) {
  return {all.begin() + begin, all.begin() + begin + count};
}

std::vector<float> random_floats(std::mt19937& random, int64_t count) {
  std::normal_distribution<float> normal(0, 0.5F);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) x = normal(random);
  return out;
}

/// One call of every kernel, with its reference.
class Call {
 public:
  Call(const Setting& setting, uint64_t seed)
      : s(setting),
        random(static_cast<unsigned>(seed + 31 * s.time + s.dqk)),
        q(s, s.dqk, s.dtype, !s.strided),
        k(s, s.dqk, s.dtype, !s.strided),
        v(s, s.dv, s.dtype, !s.strided),
        g(s, s.dv, s.dtype == Dtype::kBFloat16 ? s.dtype : Dtype::kFloat32, true),
        h(s, s.dv, s.dtype, !s.strided),
        dq(s, s.dqk, s.dtype, !s.strided),
        dk(s, s.dqk, s.dtype, !s.strided),
        dv(s, s.dv, s.dtype, !s.strided) {
    sequences = s.packed.empty() ? s.batch : static_cast<int64_t>(s.packed.size()) - 1;
    chunks.cu_seqlens = s.packed.empty() ? nullptr : s.packed.data();
    chunks.num_sequences = static_cast<int32_t>(sequences);
    chunks.time = static_cast<int32_t>(s.time);
    chunks.num_heads = static_cast<int32_t>(s.heads);
    chunks.length = s.length;
    chunks.segments = s.segments;
    chunks.slots =
        static_cast<int32_t>(s.packed.empty() ? s.batch * ((s.time + s.length - 1) / s.length)
                                              : s.time / s.length + sequences);
    // A mean makes products of q and k that are not small against their terms: a normaliser near zero is ill-conditioned.
    for (Tensor* x : {&q, &k}) x->fill(random, 0.5);
    for (Tensor* x : {&v, &g}) x->fill(random, 0);
    c_size = s.dqk * s.dv;
    const int64_t items = sequences * s.heads, slots = s.heads * chunks.slots;
    used.assign(chunks.slots, false);
    records.resize(slots * s.length);
    std::fill_n(reinterpret_cast<unsigned char*>(records.data()), records.size() * 32, 0xff);
    gamma.assign(slots, NAN);
    z.assign(slots * s.length, NAN);
    product.assign(s.batch * s.time * s.heads, NAN);
    if (s.states) {
      c0 = random_floats(random, items * c_size), n0 = random_floats(random, items * s.dqk);
      dc = random_floats(random, items * c_size), dn = random_floats(random, items * s.dqk);
    }
    for (int64_t i = 0; i < sequences; ++i)
      for (int64_t head = 0; head < s.heads; ++head) prepare(i, head);
  }

  void run() {
    end_states(false, c, n);
    out(Use::kH);
    out(Use::kDq);
    end_states(true, dc0, dn0);
    out(Use::kDv);
    out(Use::kDk);
    compare();
  }

 private:
  struct Head {
    int64_t batch, begin, item;
    MlstmInput in;
    MlstmOutput out;
    MlstmGradients gradients;
    std::vector<double> product;
    std::vector<double> z_part;  ///< (T,DQK): scale z_t n_t, which nearly cancels the rest of dq_t
  };
  double scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(s.dqk))); }
  static constexpr float kEps = 1e-6F;
  int64_t padded(int64_t width) const { return (width + 63) / 64 * 64; }

  /// Inputs, reference, records, G and z of one head of one sequence.
  void prepare(int64_t sequence, int64_t head) {
    Head x;
    x.batch = s.packed.empty() ? sequence : 0;
    x.begin = s.packed.empty() ? 0 : s.packed[sequence];
    x.item = sequence * s.heads + head;
    MlstmInput& in = x.in;
    in.length = s.packed.empty() ? s.time : s.packed[sequence + 1] - x.begin;
    in.dqk = s.dqk, in.dv = s.dv, in.scale = scale(), in.eps = kEps;
    in.sigmoid_input_gate = s.sigmoid, in.normalize = s.normalize;
    in.q = q.rows(x.batch, x.begin, in.length, head);
    in.k = k.rows(x.batch, x.begin, in.length, head);
    in.v = v.rows(x.batch, x.begin, in.length, head);
    std::normal_distribution<double> igate(s.input_mean, s.gate_spread);
    std::normal_distribution<double> fgate(s.forget_mean, s.gate_spread);
    for (int64_t t = 0; t < in.length; ++t) {
      in.igate.push_back(igate(random));
      in.fgate.push_back(fgate(random));
      in.reset.push_back(s.resets && (t % 64 == 0 ? t % 128 == 0 : t % 37 == 5 || t % 37 == 6));
    }
    in.c0 = s.states ? slice(c0, x.item * c_size, c_size) : std::vector<double>(c_size);
    in.n0 = s.states ? slice(n0, x.item * s.dqk, s.dqk) : std::vector<double>(s.dqk);
    in.m0 = s.states ? 0.7 : 0;
    x.out = mlstm_forward(in);
    // dh = N G, so that G is exact whatever its format.
    std::vector<double> dh = g.rows(x.batch, x.begin, in.length, head);
    for (size_t i = 0; i < dh.size(); ++i) dh[i] *= x.out.norm[i / static_cast<size_t>(s.dv)];
    x.gradients = mlstm_backward(
        in, dh, s.states ? slice(dc, x.item * c_size, c_size) : std::vector<double>(c_size),
        s.states ? slice(dn, x.item * s.dqk, s.dqk) : std::vector<double>(s.dqk));
    fill_records(x, sequence, head);
    heads.push_back(std::move(x));
  }

  int64_t first_slot(int64_t sequence) const {
    return s.packed.empty() ? sequence * ((s.time + s.length - 1) / s.length)
                            : s.packed[sequence] / s.length + sequence;
  }

  void fill_records(Head& x, int64_t sequence, int64_t head) {
    const MlstmInput& in = x.in;
    const int64_t base = head * chunks.slots + first_slot(sequence);
    const auto split = [](double value, float& high, float& rest) {
      value /= std::log(2.0);
      high = static_cast<float>(value);
      rest = static_cast<float>(value - high);
    };
    std::vector<double> normaliser = in.n0;
    double m = s.sigmoid ? 0 : in.m0;
    for (int64_t begin = 0; begin < in.length; begin += s.length) {
      const int64_t slot = base + begin / s.length;
      const int64_t count = std::min<int64_t>(s.length, in.length - begin);
      used[slot - head * chunks.slots] = true;
      GateRecord* const r = &records[slot * s.length];
      std::vector<double> alpha(count);
      double b = 0, peak = m, m_t = m;
      int start = 0;
      bool was_reset = false;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = begin + i;
        const double lf = log_sigmoid(in.fgate[t]);
        const double li = s.sigmoid ? log_sigmoid(in.igate[t]) : in.igate[t];
        if (in.reset[t]) {
          b = 0, peak = 0, start = static_cast<int>(i), was_reset = true;
          std::fill(normaliser.begin(), normaliser.end(), 0.0);
        }
        const double m_before = in.reset[t] ? 0 : m_t;
        b += lf;
        alpha[i] = li - b;
        peak = s.sigmoid ? -b : std::max(peak, alpha[i]);
        m_t = b + peak;
        split(alpha[i], r[i].alpha, r[i].alpha_rest);
        split(peak, r[i].peak, r[i].peak_rest);
        r[i].w = was_reset ? 0 : static_cast<float>(scale() * std::exp(b + m - m_t));
        r[i].floor = static_cast<float>(std::exp(std::min(-m_t, 80.0)));
        r[i].start = start;
        double p = 0, gh = 0;
        for (int64_t d = 0; d < s.dqk; ++d) {
          normaliser[d] = std::exp(lf + m_before - m_t) * normaliser[d] +
                          std::exp(li - m_t) * in.k[t * s.dqk + d];
          p += scale() * in.q[t * s.dqk + d] * normaliser[d];
        }
        for (int64_t d = 0; d < s.dv; ++d)
          gh += g.get(x.batch, x.begin + t, head, d) * x.out.h[t * s.dv + d];
        x.product.push_back(p);
        const bool active = s.normalize && std::fabs(p) > std::exp(std::min(-m_t, 80.0));
        z[slot * s.length + i] = !active ? 0.0F : static_cast<float>(p > 0 ? -gh : gh);
        for (int64_t d = 0; d < s.dqk; ++d)
          x.z_part.push_back(scale() * z[slot * s.length + i] * normaliser[d]);
      }
      for (int64_t i = 0; i < count; ++i)
        r[i].u = i < start ? 0 : static_cast<float>(std::exp(b + alpha[i] - m_t));
      gamma[slot] = was_reset ? 0 : static_cast<float>(std::exp(b + m - m_t));
      for (int64_t i = count; i < s.length; ++i) {
        r[i] = {-1e38F, 0, 0, 0, 0, 0, 1, s.length};
        z[slot * s.length + i] = 0;
      }
      m = m_t;
    }
  }

  StateParams state_params(bool reverse) {
    StateParams p;
    p.chunks = chunks;
    p.reverse = reverse;
    p.b = (reverse ? q : k).operand;
    p.x = (reverse ? g : v).operand;
    p.records = records.data();
    p.gamma = gamma.data();
    p.z = reverse ? z.data() : nullptr;
    p.dqk = static_cast<int32_t>(s.dqk), p.dv = static_cast<int32_t>(s.dv);
    if (s.states) {
      p.start_c = (reverse ? dc : c0).data();
      p.start_n = (reverse ? dn : n0).data();
    }
    return p;
  }

  /// The states that enter the segments, in [item][segment].
  void scan(std::vector<float>& sums, const float* start, const std::vector<float>& decay,
            int64_t size, bool reverse) const {
    for (int64_t item = 0; item < sequences * s.heads; ++item) {
      for (int64_t i = 0; i < size; ++i) {
        float state = start == nullptr ? 0 : start[item * size + i];
        for (int step = 0; step < s.segments; ++step) {
          const int64_t at = item * s.segments + (reverse ? s.segments - 1 - step : step);
          const float after = decay[at] * state + sums[at * size + i];
          sums[at * size + i] = state;
          state = after;
        }
      }
    }
  }

  /// Runs the state kernel (twice where there are segments): states of the chunks, and those at the end.
  void end_states(bool reverse, std::vector<float>& end_c, std::vector<float>& end_n) {
    const int64_t items = sequences * s.heads, slots = s.heads * chunks.slots;
    StateParams p = state_params(reverse);
    std::vector<float> segment_c, segment_n, segment_gamma;
    if (s.segments > 1) {
      segment_c.assign(items * s.segments * c_size, NAN);
      segment_n.assign(items * s.segments * s.dqk, NAN);
      segment_gamma.assign(items * s.segments, NAN);
      StateParams sums = p;
      sums.start_c = sums.start_n = nullptr;
      sums.segment_c = segment_c.data();
      sums.segment_n = segment_n.data();
      sums.segment_gamma = segment_gamma.data();
      launch_state(sums, s.device, nullptr);
      scan(segment_c, p.start_c, segment_gamma, c_size, reverse);
      scan(segment_n, p.start_n, segment_gamma, s.dqk, reverse);
      p.start_c = segment_c.data();
      p.start_n = segment_n.data();
    }
    end_c.assign(items * c_size, NAN);
    end_n.assign(items * s.dqk, NAN);
    planes = s.dtype == Dtype::kBFloat16 ? 1 : 2;
    states.assign(slots * planes * padded(s.dqk) * padded(s.dv), 0xffff);
    state_n.assign(slots * padded(s.dqk), NAN);
    p.end_c = end_c.data(), p.end_n = end_n.data();
    p.states = states.data(), p.state_n = state_n.data();
    launch_state(p, s.device, nullptr);
    check_padding();
  }

  /// Padding of used slots is zero, unused slots are as they were.
  void check_padding() const {
    const int64_t rows = padded(s.dqk), columns = padded(s.dv);
    for (int64_t i = 0; i < static_cast<int64_t>(states.size()); ++i) {
      const int64_t slot = i / (columns * rows * planes) % chunks.slots;
      if (!used[slot]) expect(states[i] == 0xffff, "state of an unused slot", i);
      if (used[slot] && (i % columns >= s.dv || i / columns % rows >= s.dqk))
        expect((states[i] & 0x7fff) == 0, "padding of a state", i);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(state_n.size()); ++i) {
      if (used[i / rows % chunks.slots] && i % rows >= s.dqk)
        expect(state_n[i] == 0, "padding of n", i);
    }
  }

  void out(Use use) {
    const bool for_keys = use == Use::kDq || use == Use::kDk;
    SweepParams p;
    p.chunks = chunks;
    p.a = (use == Use::kH ? q : use == Use::kDv ? k : use == Use::kDq ? g : v).operand;
    p.b = (use == Use::kH ? k : use == Use::kDv ? q : use == Use::kDq ? v : g).operand;
    p.x = (use == Use::kH ? v : use == Use::kDv ? g : use == Use::kDq ? k : q).operand;
    p.out = (use == Use::kH ? h : use == Use::kDv ? dv : use == Use::kDq ? dq : dk).operand;
    p.scale = static_cast<float>(scale());
    p.records = records.data();
    p.gamma = gamma.data();
    p.normalize = s.normalize, p.eps = kEps;
    p.product = use == Use::kH ? product.data() : nullptr;
    p.dqk = static_cast<int32_t>(s.dqk), p.dv = static_cast<int32_t>(s.dv);
    p.states = states.data(), p.state_n = state_n.data();
    const int tile = out_tile_columns(s.dtype, s.device);
    tiles = (s.dqk + tile - 1) / tile;
    if (for_keys) {
      p.z = z.data();
      p.dot = (use == Use::kDq ? q : k).operand;
      std::vector<float>& dots = use == Use::kDq ? dots_q : dots_k;
      dots.assign(tiles * s.heads * chunks.slots * s.length, NAN);
      p.dots = dots.data();
    }
    launch_out(use, p, s.device, nullptr);
  }

  /// Row dots of a gradient with its operand, for one head; zero beyond the end of a sequence.
  void compare_dots(Difference& difference, const Head& x, const std::vector<float>& dots,
                    const std::vector<double>& operand, const std::vector<double>& gradient) const {
    const int64_t sequence = x.item / s.heads, head = x.item % s.heads;
    const int64_t end = (x.in.length + s.length - 1) / s.length * s.length;
    for (int64_t t = 0; t < end; ++t) {
      double got = 0, wanted = 0, operand_size = 0, gradient_size = 0;
      for (int64_t tile = 0; tile < tiles; ++tile)
        got += dots[((tile * s.heads + head) * chunks.slots + first_slot(sequence)) * s.length + t];
      if (t >= x.in.length) {
        expect(got == 0, "row dots beyond the end", t);
        continue;
      }
      for (int64_t d = t * s.dqk; d < (t + 1) * s.dqk; ++d) {
        wanted += operand[d] * gradient[d];
        operand_size += operand[d] * operand[d];
        gradient_size += gradient[d] * gradient[d] + x.z_part[d] * x.z_part[d];
      }
      difference.add(got, wanted, std::sqrt(operand_size * gradient_size));
    }
  }

  void compare() {
    Difference eh("h"), ec("c"), en("n"), ep("product"), eq("dq"), ek("dk"), ev("dv"), er("q dq"),
        es("k dk"), ec0("dc0"), en0("dn0");
    for (const Head& x : heads) {
      const int64_t head = x.item % s.heads;
      const auto rows = [&](const Tensor& tensor) {
        return tensor.rows(x.batch, x.begin, x.in.length, head);
      };
      eh.add(rows(h), x.out.h);
      const std::vector<double> got = rows(dq);
      for (size_t i = 0; i < got.size(); ++i)
        eq.add(got[i], x.gradients.q[i], std::hypot(x.gradients.q[i], x.z_part[i]));
      ek.add(rows(dk), x.gradients.k);
      ev.add(rows(dv), x.gradients.v);
      ec.add(slice(c, x.item * c_size, c_size), x.out.c);
      en.add(slice(n, x.item * s.dqk, s.dqk), x.out.n);
      ec0.add(slice(dc0, x.item * c_size, c_size), x.gradients.c0);
      en0.add(slice(dn0, x.item * s.dqk, s.dqk), x.gradients.n0);
      for (int64_t t = 0; t < x.in.length; ++t)
        ep.add(product[(x.batch * s.time + x.begin + t) * s.heads + head], x.product[t],
               x.product[t]);
      compare_dots(er, x, dots_q, x.in.q, x.gradients.q);
      compare_dots(es, x, dots_k, x.in.k, x.gradients.k);
    }
    // Of float16 only the results are rounded to 11 bits.
    const double exact = s.dtype == Dtype::kBFloat16 ? 5e-3 : 2e-5;
    const double rounded = s.dtype == Dtype::kFloat16 ? 5e-4 : exact;
    for (const Difference* e : {&eh, &eq, &ek, &ev}) e->check(rounded, s.name);
    for (const Difference* e : {&ec, &en, &ec0, &en0, &ep, &er, &es}) e->check(exact, s.name);
    for (Tensor* x : {&h, &dq, &dk, &dv}) x->expect_gaps_untouched("memory between the rows");
  }

  Setting s;
  std::mt19937 random;
  Tensor q, k, v, g, h, dq, dk, dv;
  Chunks chunks;
  int64_t sequences = 1, c_size = 1, planes = 1, tiles = 1;
  std::vector<GateRecord> records;
  std::vector<float> gamma, z, product, c0, n0, dc, dn, c, n, dc0, dn0, dots_q, dots_k, state_n;
  std::vector<uint16_t> states;
  std::vector<bool> used;
  std::vector<Head> heads;
};

void run(const Setting& s, uint64_t seed) {
  simt::launch_seed = seed;
  Call(s, seed).run();
}

void run_dtypes(Setting s, uint64_t seed) {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
    s.dtype = dtype;
    run(s, seed);
  }
}

/// Every barrier and wait counts in these: several chunks, row blocks, key passes and slices, async and plain loads.
void few(uint64_t seed) {
  Setting s = {.name = "few", .time = 330, .dqk = 80, .dv = 72, .length = 256, .states = true};
  run(s, seed);  // two stages
  s.device = kSmall;
  run(s, seed);  // three
  s.time = 140, s.length = 64;
  run(s, seed);
  s.strided = true;
  run(s, seed);
  s.dtype = Dtype::kFloat32;
  run(s, seed);
}

void lengths(uint64_t seed) {
  for (const int length : {64, 128, 256}) {
    for (const int64_t time : {1, 17, 63, 64, 65, 127, 200}) {
      if (time <= length / 2 && length > 64) continue;  // as with the shorter chunk
      run_dtypes({.name = "length",
                  .time = time,
                  .dqk = 24,
                  .dv = 40,
                  .batch = 2,
                  .heads = 2,
                  .length = length,
                  .states = time % 2 == 0,
                  .device = length == 128 ? kSmall : kAmpere},
                 seed);
    }
  }
}

void heads(uint64_t seed) {
  run_dtypes({.name = "16", .time = 70, .batch = 2, .heads = 2, .states = true}, seed);
  run_dtypes({.name = "64, 128", .time = 150, .dqk = 64, .dv = 128, .heads = 2, .length = 128},
             seed);
  run_dtypes({.name = "384", .time = 67, .dqk = 384, .dv = 384, .device = kLarge}, seed);
  run_dtypes({.name = "512, 256", .time = 40, .dqk = 512, .dv = 256, .states = true}, seed);
  run_dtypes({.name = "1280", .time = 3, .dqk = 1280, .dv = 1280, .device = kSmall}, seed);
}

void orders(uint64_t seed) {
  Setting s = {.name = "strided",
               .time = 100,
               .dqk = 40,
               .dv = 200,
               .batch = 2,
               .heads = 2,
               .length = 128,
               .strided = true};
  run_dtypes(s, seed);
  s.dtype = Dtype::kFloat16;
  run(s, seed);
  s.strided = false, s.name = "float16";
  run(s, seed);
  s.dqk = 37, s.dv = 131, s.name = "odd";
  run_dtypes(s, seed);
}

void gates(uint64_t seed) {
  Setting s = {.name = "sigmoid",
               .time = 140,
               .dqk = 24,
               .dv = 40,
               .length = 128,
               .sigmoid = true,
               .states = true};
  run_dtypes(s, seed);
  s.normalize = false, s.name = "sigmoid, not normalised";
  run_dtypes(s, seed);
  s.sigmoid = false, s.name = "not normalised", s.input_mean = 0;
  run_dtypes(s, seed);
  s.normalize = true, s.name = "extreme gates", s.gate_spread = 30, s.forget_mean = 0;
  run_dtypes(s, seed);
  s.name = "closed forget gates", s.gate_spread = 1, s.forget_mean = -300;
  run_dtypes(s, seed);
  s.name = "large input gates", s.dqk = 64, s.input_mean = 500, s.forget_mean = 5;
  run_dtypes(s, seed);
}

void resets(uint64_t seed) {
  for (const int length : {64, 256})
    run_dtypes(
        {.name = "resets", .time = 300, .dqk = 24, .dv = 40, .length = length, .resets = true},
        seed);
}

void sequences(uint64_t seed) {
  Setting s = {.name = "packed",
               .time = 331,
               .dqk = 24,
               .dv = 40,
               .heads = 2,
               .length = 64,
               .states = true,
               .packed = {0, 0, 1, 60, 60, 190, 331, 331}};
  run_dtypes(s, seed);
  s.length = 128, s.segments = 2, s.name = "packed, segments";
  run_dtypes(s, seed);
  s.packed = {}, s.length = 64, s.segments = 3, s.name = "segments", s.resets = true;
  run_dtypes(s, seed);
  s.segments = 9, s.name = "empty segments";
  run_dtypes(s, seed);
}

}  // namespace

List<Case> mlstm_twophase_cases() {
  static const Case cases[] = {
      {"two-phase: few shapes", few},      {"two-phase: lengths", lengths},
      {"two-phase: heads", heads},         {"two-phase: orders", orders},
      {"two-phase: gates", gates},         {"two-phase: resets", resets},
      {"two-phase: sequences", sequences},
  };
  const bool is_slow = simt::build_kind() == simt::Build::kThread;
  return {cases, is_slow ? 1 : sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
