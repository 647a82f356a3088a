// Kernels with a planted bug: addresses and values.
#include <vector>

#include "cuda/prim/prim.h"
#include "tests/simt/cases.h"

namespace simt_test {
namespace {

using prim::u32;
using simt::launch;

float* shared_floats() { return reinterpret_cast<float*>(prim::dynamic_shared()); }

void unwritten_shared(std::uint64_t seed) {
  float out = 0;
  launch({.block = {1}, .shared_bytes = 16, .seed = seed}, [&] { out = shared_floats()[1]; });
  const double want = 0;
  expect_near(&out, &want, 1, 1, "unwritten shared memory");
}

void past_shared(std::uint64_t seed) {
  launch({.block = {33}, .shared_bytes = 128, .seed = seed},
         [&] { shared_floats()[prim::thread_idx().x] = 1; });
}

void past_global(std::uint64_t seed) {
  std::vector<float> in(64), out(65);
  const float* from = in.data();
  float* to = out.data();
  launch({.block = {65}, .seed = seed},
         [=] { to[prim::thread_idx().x] = from[prim::thread_idx().x]; });
}

void copy_past_global(std::uint64_t seed) {
  std::vector<float> in(6);
  launch({.block = {1}, .shared_bytes = 16, .seed = seed}, [&] {
    prim::cp_async16(shared_floats(), in.data() + 4);
    prim::cp_async_commit();
    prim::cp_async_wait<0>();
  });
}

struct Shared {
  float first[8];
  float second[8];
};

void into_next_array(std::uint64_t seed) {
  launch({.block = {9}, .shared_bytes = sizeof(Shared), .seed = seed}, [&] {
    auto* s = reinterpret_cast<Shared*>(prim::dynamic_shared());
    s->first[prim::thread_idx().x] = 1;
  });
}

void matrix_misaligned(std::uint64_t seed) {
  launch({.block = {32}, .shared_bytes = 1024, .seed = seed}, [&] {
    u32 r[4];
    prim::ldmatrix_x4(r, prim::dynamic_shared() + 8 + 16 * prim::thread_idx().x);
  });
}

void matrix_past_shared(std::uint64_t seed) {
  launch({.block = {32}, .shared_bytes = 500, .seed = seed}, [&] {
    u32 r[4];
    prim::ldmatrix_x4(r, prim::dynamic_shared() + 16 * prim::thread_idx().x);
  });
}

void matrix_from_stack(std::uint64_t seed) {
  launch({.block = {32}, .shared_bytes = 512, .seed = seed}, [&] {
    alignas(16) prim::u16 row[8] = {};
    u32 r[4];
    prim::ldmatrix_x4(r, row);
  });
}

void matrix_before_barrier(std::uint64_t seed) {
  launch({.block = {32}, .shared_bytes = 512, .seed = seed}, [&] {
    u32 r[4];
    for (u32 i = 0; i < 4; ++i) shared_floats()[i * 32 + prim::thread_idx().x] = 1;
    prim::ldmatrix_x4(r, prim::dynamic_shared() + 16 * prim::thread_idx().x);
  });
}

void copy_misaligned(std::uint64_t seed) {
  std::vector<float> in(8);
  launch({.block = {1}, .shared_bytes = 64, .seed = seed},
         [&] { prim::cp_async16(shared_floats() + 1, in.data()); });
}

void copy_to_global(std::uint64_t seed) {
  std::vector<float> in(8), out(8);
  launch({.block = {1}, .shared_bytes = 64, .seed = seed},
         [&] { prim::cp_async4(out.data(), in.data()); });
}

void copy_too_much(std::uint64_t seed) {
  std::vector<float> in(8);
  launch({.block = {1}, .shared_bytes = 64, .seed = seed},
         [&] { prim::cp_async4(shared_floats(), in.data(), 8); });
}

void copy_read_early(std::uint64_t seed) {
  std::vector<float> in(4, 1.0F);
  float out = 0;
  launch({.block = {1}, .shared_bytes = 16, .seed = seed}, [&] {
    prim::cp_async16(shared_floats(), in.data());
    prim::cp_async_commit();
    out = shared_floats()[0];
    prim::cp_async_wait<0>();
  });
  const double want = 1;
  expect_near(&out, &want, 1, 0, "read before the wait");
}

void wrong_grid(std::uint64_t seed) {
  launch({.grid = {3}, .block = {32}, .cluster = 2, .seed = seed}, [] {});
}

const Planted kBugs[] = {
    {"shared memory read before it is written", unwritten_shared, "wrong values"},
    {"store past the end of shared memory", past_shared, nullptr, false, true},
    {"load past the end of global memory", past_global, nullptr, false, true},
    {"copy from past the end of global memory", copy_past_global, nullptr, false, true},
    {"store into the next array of shared memory", into_next_array, nullptr, false, true},
    {"ldmatrix, misaligned", matrix_misaligned, "16-byte aligned"},
    {"ldmatrix past the end of shared memory", matrix_past_shared, "past the end"},
    {"ldmatrix from the stack", matrix_from_stack, "not in this block's shared memory"},
    {"ldmatrix before a barrier", matrix_before_barrier, nullptr, true},
    {"cp.async, misaligned", copy_misaligned, "misaligned"},
    {"cp.async to global memory", copy_to_global, "not in this block's shared memory"},
    {"cp.async of more than its size", copy_too_much, "exceeds"},
    {"cp.async, read before the wait", copy_read_early, "wrong values"},
    {"grid not a multiple of the cluster", wrong_grid, "multiple of the cluster"},
};

}  // namespace

List<Planted> access_bugs() { return {kBugs, sizeof kBugs / sizeof *kBugs}; }

}  // namespace simt_test
