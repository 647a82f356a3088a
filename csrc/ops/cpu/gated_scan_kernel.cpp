#include "csrc/ops/cpu/recurrence_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

template <class A>
void scan_channels(const GatedScanParams& p, int64_t row, int64_t channel, int64_t n) {
  const int64_t first = row * p.time * p.dim + channel;
  const A *x = static_cast<const A*>(p.x) + first, *a = static_cast<const A*>(p.a) + first;
  A* h = static_cast<A*>(p.h) + first;
  Vec<A> state(A(0));
  for (int64_t i = 0; i < p.time; ++i) {
    const int64_t t = p.reverse ? p.time - 1 - i : i;
    const int64_t gate = p.reverse ? t + 1 : t;  // beyond the last token it is never read
    const bool passes = i > 0 && !(p.reset && p.reset[row * p.time + gate]);
    const Vec<A> given = load(x + t * p.dim, n);
    state = passes ? at::vec::fmadd(load(a + gate * p.dim, n), state, given) : given;
    store(h + t * p.dim, state, n);
  }
}

template <class A>
void run(const GatedScanParams& p) {
  constexpr int64_t kSize = kLanes<A>;
  const int64_t vectors = ceil_div(p.dim, kSize);
  at::parallel_for(0, p.batch * vectors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % vectors * kSize;
      scan_channels<A>(p, task / vectors, channel, smaller(kSize, p.dim - channel));
    }
  });
}

}  // namespace

void gated_scan(const GatedScanParams& p) {
  p.dtype == Dtype::kDouble ? run<double>(p) : run<float>(p);
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
