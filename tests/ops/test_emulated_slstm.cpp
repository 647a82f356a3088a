// The sLSTM from tensors to the real CUDA kernels and back, on the CPU: csrc/ops/slstm_kernels.cpp with the emulator behind
// it, against the operator for the CPU.
#include "csrc/ops/slstm_kernels.h"

#include <limits>

#include "tests/ops/slstm_cases.h"

namespace {

using at::Tensor;
using xlstm::ops::SlstmArguments;
using xlstm::ops::SlstmDevice;
using xlstm::test::SlstmCase;

const char* const kCells[] = {"slstm", "slstm_expf", "lstm"};
const at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

const SlstmDevice kAmpere{{80, 16, 163 * 1024}}, kHopper{{90, 16, 227 * 1024, true}},
    kWithoutSharedMemory{{80, 16, 0}};  // no persistent kernel fits

/// Of relative differences. The operator for the CPU rounds y on the way out only; the kernels take it into the product in
/// bfloat16, or with 16 significant bits.
double tolerance(at::ScalarType type) {
  return type == at::kFloat ? 5e-5 : type == at::kHalf ? 5e-3 : 3e-2;
}

void check(const SlstmCase& which, at::ScalarType type, const SlstmDevice& device,
           bool persistent = true) {
  INFO(xlstm::test::title(which, type) << (persistent ? "" : " step by step"));
  const SlstmArguments a = xlstm::test::slstm_arguments(which, type);
  const auto upstream = xlstm::test::slstm_upstream(which, a);
  const auto expected = xlstm::test::slstm_expected(a, upstream);
  const at::NoGradGuard no_grad;
  const auto sizes = xlstm::ops::slstm_sizes(a);
  REQUIRE(xlstm::ops::slstm_kernels_lack(sizes, type).empty());
  REQUIRE(xlstm::ops::slstm_persistent(sizes, type, device.limits, true) == persistent);
  const auto results = xlstm::ops::slstm_kernels_forward(a, sizes, device, true);
  const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
  CHECK(y.scalar_type() == type);
  xlstm::test::check_slstm_close({"y", "y_last", "c", "n", "m"}, {y, y_last, c, n, m},
                                 expected.outputs, tolerance(type));
  const auto b = xlstm::test::slstm_backward_arguments(a, upstream, results);
  check_slstm_saved(b, true);
  const auto [dwx, dr, db, dy0, dc0, dn0] =
      xlstm::ops::slstm_kernels_backward(b, xlstm::ops::slstm_sizes(b), device);
  CHECK(dwx.scalar_type() == type);
  xlstm::test::check_slstm_close({"dwx", "dr", "db", "dy0", "dc0", "dn0"},
                                 {dwx, dr, db, dy0, dc0, dn0}, expected.gradients,
                                 2 * tolerance(type));
}

}  // namespace

TEST_CASE("sLSTM: the persistent kernels agree with the operator for the CPU", "[slstm]") {
  for (const char* cell : kCells)
    for (const at::ScalarType type : kTypes)
      for (const bool states : {false, true})
        check({.cell = cell,
               .time = 19,
               .dh = 24,
               .states = states,
               .resets = !states,
               .gate_dim = states ? 4 : 2,
               .recompute = states,
               .float_parameters = states,
               .only_y = !states,
               .strided_dy = states},
              type, kAmpere);
}

TEST_CASE("sLSTM: heads in several blocks agree with the operator for the CPU", "[slstm]") {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    check({.batch = 1, .time = 5, .heads = 1, .dh = 200, .states = true}, type, kAmpere);
    check({.batch = 1, .time = 5, .heads = 1, .dh = 200, .states = true}, type, kHopper);
  }
}

TEST_CASE("sLSTM: kernels on packed sequences, clipped and cut gradients", "[slstm]") {
  for (const bool recompute : {false, true})
    check({.cell = "slstm",
           .batch = 1,
           .dh = 16,
           .states = true,
           .resets = recompute,
           .cu_seqlens = {0, 0, 5, 5, 22, 36, 37},
           .recompute = recompute},
          at::kFloat, kAmpere);
  check({.time = 9, .states = true, .clip = 0.1}, at::kFloat, kAmpere);
  check({.time = 9, .states = true, .cut = true}, at::kFloat, kAmpere);
}

TEST_CASE("sLSTM: the persistent kernels take cu_seqlens to go from 0 to T, the others tell",
          "[slstm]") {
  const SlstmCase which{.batch = 1, .time = 64, .heads = 1, .cu_seqlens = {0, 32, 64}};
  SlstmArguments a = xlstm::test::slstm_arguments(which, at::kFloat);
  const auto upstream = xlstm::test::slstm_upstream(which, a);
  const auto both = [&](const SlstmDevice& device) {
    const at::NoGradGuard no_grad;
    const auto sizes = xlstm::ops::slstm_sizes(a);
    const auto results = xlstm::ops::slstm_kernels_forward(a, sizes, device, true);
    const auto [dwx, dr, db, dy0, dc0, dn0] = xlstm::ops::slstm_kernels_backward(
        xlstm::test::slstm_backward_arguments(a, upstream, results), sizes, device);
    const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
    return std::vector<Tensor>{y, y_last, c, n, m, gates, dwx, dr, db, dy0, dc0, dn0};
  };
  const std::vector<Tensor> wanted = both(kAmpere);
  for (const std::vector<int64_t>& ends :
       {std::vector<int64_t>{0, 32, 40}, {5, 32, 64}, {-7, 32, (int64_t{1} << 32) + 40}}) {
    a.cu_seqlens = at::tensor(ends, at::kLong);
    const std::vector<Tensor> got = both(kAmpere);
    for (size_t i = 0; i < wanted.size(); ++i) CHECK(at::equal(got[i], wanted[i]));
    CHECK_THROWS_AS(both(kWithoutSharedMemory), c10::Error);
  }
}

TEST_CASE("sLSTM: product and kernel in turn agree with the operator for the CPU", "[slstm]") {
  for (const char* cell : kCells)
    for (const at::ScalarType type : kTypes)
      for (const bool states : {false, true})
        check({.cell = cell,
               .time = 19,
               .dh = 9,
               .states = states,
               .resets = !states,
               .gate_dim = states ? 3 : 0,
               .recompute = states,
               .float_parameters = !states,
               .only_y = !states,
               .strided_dy = states},
              type, kWithoutSharedMemory, false);
  for (const bool resets : {false, true})
    for (const bool states : {false, true})
      check({.batch = 1,
             .states = states,
             .resets = resets,
             .cu_seqlens = {0, 0, 5, 5, 22, 36, 37},
             .clip = resets ? 0.1 : 0},
            at::kFloat, kWithoutSharedMemory, false);
  check({.time = 9, .states = true, .resets = true, .clip = 0.1}, at::kFloat, kWithoutSharedMemory,
        false);
  check({.time = 9, .states = true, .cut = true}, at::kFloat, kWithoutSharedMemory, false);
}

TEST_CASE("sLSTM: decoding token by token on the kernels is the whole sequence", "[slstm]") {
  for (const char* cell : kCells)
    for (const SlstmDevice& device : {kAmpere, kWithoutSharedMemory}) {
      const SlstmCase which{.cell = cell, .time = 6, .dh = 24, .states = true, .only_y = true};
      INFO(xlstm::test::title(which, at::kFloat) << " shared " << device.limits.shared_bytes);
      const SlstmArguments a = xlstm::test::slstm_arguments(which, at::kFloat);
      const auto expected =
          xlstm::test::slstm_expected(a, xlstm::test::slstm_upstream(which, a)).outputs;
      const at::NoGradGuard no_grad;
      SlstmArguments token = a;
      std::vector<Tensor> last;
      for (int64_t t = 0; t < which.time; ++t) {
        INFO("token " << t);
        token.wx = a.wx.narrow(1, t, 1);
        const auto [y, y_last, c, n, m, gates, checkpoints] =
            xlstm::ops::slstm_kernels_forward(token, xlstm::ops::slstm_sizes(token), device, false);
        CHECK(!gates.defined());
        xlstm::test::check_slstm_close({"y"}, {y}, {expected[0].narrow(1, t, 1)}, 5e-5);
        token.y0 = y_last, token.c0 = c, token.n0 = n, token.m0 = m;
        last = {y_last, c, n, m};
      }
      xlstm::test::check_slstm_close({"y_last", "c", "n", "m"}, last,
                                     {expected.begin() + 1, expected.end()}, 5e-5);
    }
}

TEST_CASE("sLSTM: which calls the kernels take", "[slstm]") {
  CHECK(xlstm::ops::slstm_kernels_lack({2, 8, 1, 64, 2}, at::kFloat).empty());
  CHECK(!xlstm::ops::slstm_kernels_lack({2, 8, 1, 64, 2}, at::kDouble).empty());
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  CHECK(xlstm::ops::slstm_kernels_lack({1, kMost - 16, 1, 4, 1}, at::kFloat).empty());
  CHECK(!xlstm::ops::slstm_kernels_lack({1, kMost - 15, 1, 4, 1}, at::kFloat).empty());
  CHECK(xlstm::ops::slstm_persistent({2, 8, 1, 64, 2}, at::kBFloat16, kAmpere.limits, true));
  CHECK(!xlstm::ops::slstm_persistent({2, 8, 1, 1040, 2}, at::kBFloat16, kAmpere.limits, true));
  CHECK(!xlstm::ops::slstm_persistent({2, 8, 1, 64, 2}, at::kBFloat16, kWithoutSharedMemory.limits,
                                      true));
}
