// What no choice of kernels, chunks and segments may change: the same inputs by two ways, compared with each other. Each
// way by itself is compared with the recurrence elsewhere; the generic path in tests/ops/test_mlstm_generic.cpp.
#include "cuda/mlstm/mlstm_plan.h"
#include "cuda/numbers.cuh"
#include "tests/simt/mlstm_call.h"

namespace simt_test {
namespace passes {
namespace {

using xlstm::cuda::Direction;
using xlstm::cuda::MlstmPlan;

constexpr Dtype kDtypes[] = {Dtype::kBFloat16, Dtype::kFloat32};
const DeviceLimits kHopper{90, 1, 227 * 1024, true};

void add_all(Error& error, const Call& got, const Call& wanted, Tensor Call::*tensor) {
  const Setting& s = got.s;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const auto numbers = (wanted.*tensor).rows(b, 0, s.time, head);
      error.add((got.*tensor).rows(b, 0, s.time, head), numbers, numbers);
    }
  }
}

void agree(const Call& got, const Call& wanted, const char* name, Tensor Call::*tensor,
           double limit) {
  Error error(name);
  add_all(error, got, wanted, tensor);
  error.check(limit);
}

void agree(const char* name, const std::vector<float>& got, const std::vector<float>& wanted,
           double limit) {
  Error error(name);
  const std::vector<double> numbers(wanted.begin(), wanted.end());
  error.add({got.begin(), got.end()}, numbers, numbers);
  error.check(limit);
}

void agree_forward(const Call& got, const Call& wanted, double m_limit = 1e-6) {
  const double limit = tolerance(got.s.dtype).value;
  agree(got, wanted, "h", &Call::h, limit);
  agree("c", got.c, wanted.c, limit);
  agree("n", got.n, wanted.n, limit);
  agree("m", got.m, wanted.m, m_limit);
}

void agree_backward(const Call& got, const Call& wanted) {
  const Tolerance limit = tolerance(got.s.dtype);
  agree(got, wanted, "dq", &Call::dq, limit.value);
  agree(got, wanted, "dk", &Call::dk, limit.value);
  agree(got, wanted, "dv", &Call::dv, limit.value);
  agree(got, wanted, "digate", &Call::digate, limit.value);
  agree(got, wanted, "dfgate", &Call::dfgate, limit.forget);
  if (!got.s.states) return;
  agree("dc0", got.dc0, wanted.dc0, limit.value);
  agree("dn0", got.dn0, wanted.dn0, limit.value);
}

/// One way: a setting, and what its plan must be so that the comparison is one.
struct Way {
  Setting setting;
  bool (*expected)(const MlstmPlan&);
};

void run_ways(const std::vector<Way>& ways, uint64_t seed) {
  simt::launch_seed = seed;
  std::vector<Call> calls;
  calls.reserve(ways.size());
  for (const Way& way : ways) {
    try {
      Call& call = calls.emplace_back(way.setting, seed);
      for (const Direction direction : {Direction::kForward, Direction::kBackward})
        expect(way.expected(plan_mlstm(call.problem, way.setting.device, direction)), "plan");
      call.forward();
      call.backward();
      if (calls.size() == 1) continue;
      agree_forward(call, calls[0]);
      agree_backward(call, calls[0]);
    } catch (const Mismatch& error) {
      throw Mismatch("ways disagree, " + std::string(error.what()) + describe(way.setting));
    }
  }
}

void paths_of(Setting s, uint64_t seed) {
  std::vector<Way> ways = {{s, [](const MlstmPlan& p) { return p.fused && !p.sm90; }}};
  s.two_phase = true;
  ways.push_back({s, [](const MlstmPlan& p) { return !p.fused; }});
  if (s.dtype == Dtype::kBFloat16) {
    s.device = kHopper;
    ways.push_back({s, [](const MlstmPlan& p) { return !p.fused; }});
    s.two_phase = false;
    ways.push_back({s, [](const MlstmPlan& p) { return p.sm90; }});
  }
  run_ways(ways, seed);
}

/// The fused sweep and the two-phase kernels, for sm_80 and for sm_90a.
void paths(uint64_t seed) {
  for (const Dtype dtype : kDtypes) {
    Setting s = {.time = 150, .heads = 2, .dqk = 24, .dv = 40, .dtype = dtype, .states = true};
    paths_of(s, seed);
    if (thread_build()) return;
    s.sigmoid = s.resets = true;
    paths_of(s, seed);
    s.packed = {0, 0, 1, 64, 128, 150}, s.sigmoid = false;
    paths_of(s, seed);
    s.normalize = false;
    paths_of(s, seed);
  }
}

/// In one schedule, as the segments: other tests run the same kernels in three.
void chunk_lengths(uint64_t seed) {
  if (seed != 1) return;
  for (const Dtype dtype : kDtypes) {
    Setting s = {.time = 300, .heads = 2, .dtype = dtype, .states = true, .two_phase = true};
    s.chunk_size = 64;
    std::vector<Way> ways = {{s, [](const MlstmPlan& p) { return p.chunks.length == 64; }}};
    s.chunk_size = 128;
    ways.push_back({s, [](const MlstmPlan& p) { return p.chunks.length == 128; }});
    s.chunk_size = 256;
    ways.push_back({s, [](const MlstmPlan& p) { return p.chunks.length == 256; }});
    run_ways(ways, seed);
  }
}

void segment_counts(uint64_t seed) {
  if (seed != 1) return;
  for (const bool two_phase : {false, true}) {
    for (const Dtype dtype : kDtypes) {
      Setting s = {.time = 720,
                   .heads = 2,
                   .dtype = dtype,
                   .states = true,
                   .resets = true,
                   .chunk_size = 64,
                   .two_phase = two_phase};
      std::vector<Way> ways = {{s, [](const MlstmPlan& p) { return p.chunks.segments == 1; }}};
      s.device.num_multiprocessors = 2;
      ways.push_back({s, [](const MlstmPlan& p) { return p.chunks.segments == 2; }});
      s.device.num_multiprocessors = 1000;
      ways.push_back({s, [](const MlstmPlan& p) { return p.chunks.segments == 3; }});
      run_ways(ways, seed);
    }
  }
}

/// Updates the states of `call` token after token, from the initial ones.
void step_through(Call& call) {
  const Setting& s = call.s;
  const auto begin = [](std::vector<float>& state, const std::vector<float>& from) {
    if (from.empty())
      std::fill(state.begin(), state.end(), 0.0F);
    else
      state = from;
  };
  begin(call.c, call.c0), begin(call.n, call.n0), begin(call.m, call.m0);
  xlstm::cuda::MlstmProblem problem = call.problem;
  problem.time = 1;
  for (int64_t t = 0; t < s.time; ++t) {
    const auto token = [&](const Tensor& x) {
      View view = x.view;
      const int64_t bytes = x.dtype() == Dtype::kFloat32 ? 4 : 2;
      view.data = static_cast<char*>(view.data) + t * view.time * bytes;
      view.time = 0;
      return view;
    };
    xlstm::cuda::MlstmStep step;
    step.q = token(call.q), step.k = token(call.k), step.v = token(call.v), step.h = token(call.h);
    step.igate = token(call.igate), step.fgate = token(call.fgate);
    step.c = call.c.data(), step.n = call.n.data(), step.m = call.m.data();
    mlstm_step(problem, step, nullptr);
  }
}

void steps(uint64_t seed) {
  simt::launch_seed = seed;
  for (const Dtype dtype : kDtypes) {
    for (const bool sigmoid : {false, true}) {
      for (const bool normalize : {true, false}) {
        const Setting s = {.batch = 2,
                           .time = 70,
                           .dqk = 24,
                           .dv = 40,
                           .dtype = dtype,
                           .sigmoid = sigmoid,
                           .normalize = normalize,
                           .states = sigmoid == normalize};
        Call chunkwise(s, seed), stepped(s, seed);
        chunkwise.forward();
        step_through(stepped);
        try {
          agree_forward(stepped, chunkwise, 1e-5);  // rounded at every token
        } catch (const Mismatch& error) {
          throw Mismatch("step and chunks disagree, " + std::string(error.what()) + describe(s));
        }
      }
    }
  }
}

/// Tokens [begin, end) of all inputs, gates among them.
void overwrite(const Call& call, int64_t begin, int64_t end, float value) {
  for (const Tensor* x : {&call.q, &call.k, &call.v, &call.igate, &call.fgate}) {
    const bool is_gate = x == &call.igate || x == &call.fgate;
    const int64_t width = is_gate ? 1 : x == &call.v ? call.s.dv : call.s.dqk;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < call.s.heads; ++h)
        for (int64_t d = 0; d < width; ++d)
          xlstm::cuda::store_number(x->view.data, t * x->view.time + h * x->view.head + d,
                                    x->dtype(), value);
  }
}

/// What happens in a document changes no bit of another: packed sequences whatever it is, after a reset unless numbers
/// cease to be finite, as products with weights of 0 take part in the same sums.
void documents_apart(uint64_t seed) {
  simt::launch_seed = seed;
  const auto check = [&](const Setting& s, int64_t begin, int64_t end, float value) {
    Call before(s, seed), after(s, seed);
    overwrite(after, begin + 2, end - 2, value);
    for (Call* call : {&before, &after}) call->forward(), call->backward();
    const Tensor Call::*const results[] = {&Call::h,  &Call::dq,     &Call::dk,
                                           &Call::dv, &Call::digate, &Call::dfgate};
    for (const auto result : results)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t t = 0; t < s.time; ++t) {
          const auto token = [&](const Call& call) { return (call.*result).rows(0, t, 1, h); };
          if ((t < begin || t >= end) && token(before) != token(after))
            throw Mismatch("documents meet at token " + std::to_string(t) + describe(s));
        }
    for (size_t i = 0; !s.packed.empty() && i < before.c.size();
         ++i)  // of the first document and the last
      if (i * 3 / before.c.size() != 1 && before.c[i] != after.c[i])
        throw Mismatch("documents meet in the states" + describe(s));
  };
  for (const Dtype dtype : kDtypes)
    for (const DeviceLimits& device : {kAmpere, kHopper})
      for (const bool two_phase : {false, true}) {
        Setting s = {.time = 200, .heads = 2, .dqk = 24, .dv = 40, .dtype = dtype, .resets = true};
        s.two_phase = two_phase, s.device = device;
        check(s, 43, 79, 3);
        // The first one ends inside its second chunk: what is loaded of its tail is the second one's.
        s.resets = false, s.packed = {0, 100, 136, 200}, s.chunk_size = 64;
        check(s, 100, 136, NAN);
      }
}

/// Where q is zero and exp(-m) underflows, h is zero and not 0 / 0, with eps = 0 too.
void no_query(uint64_t seed) {
  simt::launch_seed = seed;
  for (const Dtype dtype : kDtypes) {
    const auto h_is_zero = [&](Setting s, void (*run)(Call&)) {
      s.time = 70, s.dtype = dtype, s.input_bias = 200;
      Call call(s, seed);
      std::mt19937 random;
      call.q.fill(random, 0, 0);
      call.problem.eps = 0;
      run(call);
      for (const double h : call.h.rows(0, 0, s.time, 0))
        if (h != 0) throw Mismatch("h without a query is " + std::to_string(h) + describe(s));
    };
    for (const DeviceLimits& device : {kAmpere, kHopper})
      for (const bool two_phase : {false, true})
        h_is_zero({.two_phase = two_phase, .device = device}, [](Call& call) { call.forward(); });
    h_is_zero({}, step_through);
  }
}

}  // namespace
}  // namespace passes

List<Case> mlstm_agreement_cases() {
  static const Case cases[] = {
      {"mlstm agreement: paths", passes::paths},
      {"mlstm agreement: chunk lengths", passes::chunk_lengths},
      {"mlstm agreement: segments", passes::segment_counts},
      {"mlstm agreement: steps", passes::steps},
      {"mlstm agreement: no query", passes::no_query},
      {"mlstm agreement: documents apart", passes::documents_apart},
  };
  // No code that others do not run: the sanitizers see a part.
  return {cases, simt::build_kind() == simt::Build::kPlain ? size_t{6} : size_t{1}};
}

}  // namespace simt_test
