// The sLSTM in ATen calls, which CUDA tensors take without kernels, on the CPU: equal to the operator for the CPU, which
// test_slstm.cpp compares with plain loops.
#include "csrc/ops/slstm_generic.h"

#include <cstring>

#include "tests/ops/slstm_cases.h"

namespace {

using xlstm::ops::SlstmArguments;
using xlstm::test::SlstmCase;

const char* const kCells[] = {"slstm", "slstm_expf", "lstm"};

/// Largest relative difference: in 16 bits the generic path rounds y before every product, the operator for the CPU only
/// on the way out.
double tolerance(at::ScalarType type) {
  return type == at::kDouble ? 1e-12 : type == at::kFloat ? 2e-5 : type == at::kHalf ? 5e-3 : 3e-2;
}

void check(const SlstmCase& which, at::ScalarType type = at::kDouble) {
  INFO(xlstm::test::title(which, type));
  const SlstmArguments a = xlstm::test::slstm_arguments(which, type);
  const auto upstream = xlstm::test::slstm_upstream(which, a);
  const auto expected = xlstm::test::slstm_expected(a, upstream);
  const at::NoGradGuard no_grad;
  const auto results = xlstm::ops::slstm_generic_forward(a, true);
  const auto& [y, y_last, c, n, m, gates, checkpoints] = results;
  xlstm::test::check_slstm_close({"y", "y_last", "c", "n", "m"}, {y, y_last, c, n, m},
                                 expected.outputs, tolerance(type));
  CHECK(y.scalar_type() == type);
  const auto b = xlstm::test::slstm_backward_arguments(a, upstream, results);
  check_slstm_saved(b, true);
  const auto [dwx, dr, db, dy0, dc0, dn0] = xlstm::ops::slstm_generic_backward(b);
  CHECK(dwx.scalar_type() == type);
  CHECK(xlstm::ops::slstm_gate_dim(dwx) == xlstm::ops::slstm_gate_dim(a.wx));
  xlstm::test::check_slstm_close({"dwx", "dr", "db", "dy0", "dc0", "dn0"},
                                 {dwx, dr, db, dy0, dc0, dn0}, expected.gradients,
                                 2 * tolerance(type));
}

}  // namespace

TEST_CASE("sLSTM in ATen calls: cells, states, resets, gradients", "[slstm_generic]") {
  for (const char* cell : kCells)
    for (const bool states : {false, true})
      for (const bool resets : {false, true})
        for (const bool recompute : {false, true})
          check({.cell = cell,
                 .states = states,
                 .resets = resets,
                 .recompute = recompute,
                 .only_y = !states});
}

TEST_CASE("sLSTM in ATen calls: packed sequences", "[slstm_generic]") {
  for (const char* cell : kCells)
    for (const bool states : {false, true})
      for (const bool recompute : {false, true})
        check({.cell = cell,
               .batch = 1,
               .dh = 7,
               .states = states,
               .resets = recompute,
               .cu_seqlens = {0, 0, 5, 5, 22, 36, 37},
               .recompute = recompute});
}

TEST_CASE("sLSTM in ATen calls: clipped and cut recurrent gradients", "[slstm_generic]") {
  for (const char* cell : kCells)
    for (const bool resets : {false, true}) {
      check({.cell = cell, .states = true, .resets = resets, .clip = 0.1});
      check({.cell = cell, .states = true, .resets = resets, .cut = true});
      check({.cell = cell,
             .batch = 1,
             .states = true,
             .resets = resets,
             .cu_seqlens = {0, 0, 20, 37},
             .clip = 0.1});
    }
}

TEST_CASE("sLSTM in ATen calls: memory orders and number types", "[slstm_generic]") {
  for (const int gate_dim : {0, 2, 3, 4})
    check({.dh = 5, .states = true, .gate_dim = gate_dim, .strided_dy = true});
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf})
    for (const char* cell : kCells)
      for (const bool recompute : {false, true})
        check({.cell = cell,
               .states = true,
               .resets = true,
               .gate_dim = 4,
               .recompute = recompute,
               .float_parameters = recompute},
              type);
}

TEST_CASE("sLSTM in ATen calls: no tokens, no sequences, one token", "[slstm_generic]") {
  for (const char* cell : kCells)
    for (const bool recompute : {false, true})
      for (const bool states : {false, true}) {
        check({.cell = cell, .time = 0, .states = states, .recompute = recompute});
        check({.cell = cell, .batch = 0, .states = states, .recompute = recompute});
        check({.cell = cell, .time = 1, .states = states, .recompute = recompute});
        check({.cell = cell,
               .batch = 1,
               .time = 0,
               .states = states,
               .cu_seqlens = {0, 0, 0},
               .recompute = recompute});
        check({.cell = cell, .dh = 1, .states = states, .recompute = recompute});
      }
}

TEST_CASE("sLSTM in ATen calls: sums over many tokens in parts", "[slstm_generic]") {
  for (const int gate_dim : {0, 2, 3, 4})
    check({.batch = 4, .time = 512, .dh = 3, .gate_dim = gate_dim});
  check({.batch = 3, .time = 683, .dh = 3, .states = true, .resets = true});  // not to be divided
}
