#include "csrc/ops/cpu/recurrence_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class A>
const A* row_of(const void* data, int64_t row, int64_t width) {
  return static_cast<const A*>(data) + row * width;
}
template <class A>
A* row_of(void* data, int64_t row, int64_t width) {
  return static_cast<A*>(data) + row * width;
}

/// The states of one vector of channels, N of them, over the tokens of a row.
template <class A>
class Walk {
 public:
  Walk(const SelectiveScanParams& params, int64_t row, int64_t first, int64_t count)
      : p(params), row_(row), i(first), n(count) {}

  Vec<A> get(const void* data, int64_t at) const { return load(row_of<A>(data, at, p.dim) + i, n); }
  void put(void* data, int64_t at, const Vec<A>& value) const {
    store(row_of<A>(data, at, p.dim) + i, value, n);
  }
  int64_t token(int64_t t) const { return row_ * p.time + t; }
  bool resets(int64_t t) const { return p.reset != nullptr && p.reset[token(t)]; }

  void start(Vec<A>* h) const {
    for (int64_t s = 0; s < p.states; ++s)
      h[s] = p.state0 == nullptr ? Vec<A>(A(0)) : get(p.state0, row_ * p.states + s);
  }
  /// h <- e^{delta a} h + delta b x
  void enter(int64_t t, Vec<A>* h) const {
    const Vec<A> delta = get(p.delta, token(t)), in = delta * get(p.x, token(t));
    const A* const b = row_of<A>(p.b, token(t), p.states);
    const bool empty = resets(t);
    for (int64_t s = 0; s < p.states; ++s) {
      const Vec<A> kept = empty ? Vec<A>(A(0)) : exp(delta * get(p.a, s)) * h[s];
      h[s] = kept + in * Vec<A>(b[s]);
    }
  }

  void forward() const {
    const Scratch<Vec<A>> memory(p.states);
    Vec<A>* const h = memory.get();
    start(h);
    const Vec<A> skip = get(p.skip, 0);
    for (int64_t t = 0; t < p.time; ++t) {
      enter(t, h);
      const A* const c = row_of<A>(p.c, token(t), p.states);
      Vec<A> y = skip * get(p.x, token(t));
      for (int64_t s = 0; s < p.states; ++s) y = y + h[s] * Vec<A>(c[s]);
      put(p.y, token(t), y);
    }
    for (int64_t s = 0; s < p.states; ++s) put(p.state, row_ * p.states + s, h[s]);
  }

  /// `states`: N of them before every token. `db`, `dc`: (T,N), added to.
  void backward(Vec<A>* states, A* db, A* dc) const {
    run_forward_again(states);
    const Vec<A> zero(A(0)), skip = get(p.skip, 0);
    const Scratch<Vec<A>> memory(2 * p.states);
    Vec<A>*const dh = memory.get(), *const da = dh + p.states;
    for (int64_t s = 0; s < p.states; ++s) {
      dh[s] = p.dstate == nullptr ? zero : get(p.dstate, row_ * p.states + s);
      da[s] = zero;
    }
    Vec<A> dskip = zero;
    for (int64_t t = p.time - 1; t >= 0; --t) {
      const Vec<A> dy = get(p.dy, token(t)), x = get(p.x, token(t)), delta = get(p.delta, token(t));
      const A *const b = row_of<A>(p.b, token(t), p.states), *const c =
                                                                 row_of<A>(p.c, token(t), p.states);
      const Vec<A>*const before = states + t * p.states, *const after = before + p.states;
      const bool empty = resets(t);
      Vec<A> dx = dy * skip, ddelta = zero;
      for (int64_t s = 0; s < p.states; ++s) {
        const Vec<A> a = get(p.a, s), old = empty ? zero : before[s];
        dc[t * p.states + s] += horizontal_sum(first_lanes<A>(dy * after[s], n));
        const Vec<A> d = dh[s] + dy * Vec<A>(c[s]);
        const Vec<A> decay = exp(delta * a), through = d * old * decay;
        da[s] = da[s] + through * delta;
        ddelta = ddelta + through * a + d * x * Vec<A>(b[s]);
        dx = dx + d * delta * Vec<A>(b[s]);
        db[t * p.states + s] += horizontal_sum(first_lanes<A>(d * delta * x, n));
        dh[s] = empty ? zero : d * decay;
      }
      dskip = dskip + dy * x;
      put(p.dx, token(t), dx), put(p.ddelta, token(t), ddelta);
    }
    for (int64_t s = 0; s < p.states; ++s) {
      put(p.dstate0, row_ * p.states + s, dh[s]);
      put(p.da, row_ * p.states + s, da[s]);
    }
    put(p.dskip, row_, dskip);
  }

 private:
  void run_forward_again(Vec<A>* states) const {
    start(states);
    for (int64_t t = 0; t < p.time; ++t) {
      Vec<A>* const next = states + (t + 1) * p.states;
      for (int64_t s = 0; s < p.states; ++s) next[s] = states[t * p.states + s];
      enter(t, next);
    }
  }

  const SelectiveScanParams& p;
  int64_t row_, i, n;
};

template <class A>
void run_forward(const SelectiveScanParams& p) {
  const int64_t vectors = ceil_div(p.dim, kLanes<A>);
  at::parallel_for(0, p.batch * vectors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % vectors * kLanes<A>;
      Walk<A>(p, task / vectors, i, smaller(kLanes<A>, p.dim - i)).forward();
    }
  });
}

/// A task is a block of channels of one row; blocks do not depend on the vector length, so that db and dc are summed in
/// one order everywhere.
template <class A>
void run_backward(const SelectiveScanParams& p) {
  const int64_t blocks = ceil_div(p.dim, p.block), sums = p.time * p.states;
  at::parallel_for(0, p.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<Vec<A>> states((p.time + 1) * p.states);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, block = task % blocks;
      A* const db = row_of<A>(p.db, block * p.batch + row, sums);
      A* const dc = row_of<A>(p.dc, block * p.batch + row, sums);
      for (int64_t j = 0; j < sums; ++j) db[j] = dc[j] = 0;
      const int64_t last = smaller(p.dim, (block + 1) * p.block);
      for (int64_t i = block * p.block; i < last; i += kLanes<A>)
        Walk<A>(p, row, i, smaller(kLanes<A>, last - i)).backward(states.get(), db, dc);
    }
  });
}

}  // namespace

void selective_scan(const SelectiveScanParams& p) {
  p.dtype == Dtype::kDouble ? run_forward<double>(p) : run_forward<float>(p);
}
void selective_scan_backward(const SelectiveScanParams& p) {
  p.dtype == Dtype::kDouble ? run_backward<double>(p) : run_backward<float>(p);
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
