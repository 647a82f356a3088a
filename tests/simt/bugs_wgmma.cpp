// Kernels with a planted bug: wgmma.
#include <vector>

#include "cuda/prim/prim.h"
#include "tests/simt/cases.h"
#include "tests/simt/tensor_cases.h"

namespace simt_test {
namespace {

using prim::Swizzle;
using prim::u16;
using prim::u32;
using prim::u64;
using simt::launch;

u16* shared_tile() { return reinterpret_cast<u16*>(prim::dynamic_shared() + kTile); }
u32 tile_address(u32 offset) { return prim::shared_u32(prim::dynamic_shared() + kTile) + offset; }

/// The registers of a kernel that multiplies 64 x 16 by 16 x 64, both K-major with 32-byte swizzle.
struct State {
  float d[32];
  u32 fragment[4];
  u64 a, b;
};
constexpr Operand kOperand{false, Swizzle::k32, 64, 16};

struct Flaws {
  bool swizzle = true;
  u32 fencing_warps = 4, shared_offset = 0, threads = 128;
};

/// Fills shared memory and the fragment of A, then `body(state, thread)` multiplies into state.d.
template <class Body>
void multiply(const Flaws& flaws, std::uint64_t seed, Body body) {
  const Matrix a(kOperand), b(kOperand, 1);
  std::vector<float> out(64 * 64);
  launch({.block = {flaws.threads},
          .shared_bytes = kTile + 4096,
          .seed = seed,
          .shared_offset = flaws.shared_offset},
         [&] {
           const u32 t = prim::thread_idx().x, row = 16 * (t / 32) + t % 32 / 4;
           for (u32 i = t; i < 1024; i += flaws.threads) {
             const u32 at = (flaws.swizzle ? prim::swizzled(2 * i, Swizzle::k32) : 2 * i) / 2;
             shared_tile()[at] = a.data[i];
             shared_tile()[1024 + at] = b.data[i];
           }
           if (t / 32 < flaws.fencing_warps) prim::fence_proxy_async();
           prim::sync_block();
           State state{};
           for (u32 r = 0; r < 4 && t < 128; ++r) {
             const u32 m = row + 8 * (r % 2), k = 2 * (t % 4) + 8 * (r / 2);
             state.fragment[r] = prim::pack_bf16x2(a.at(m, k), a.at(m, k + 1));
           }
           state.a = kOperand.descriptor(tile_address(0), 0);
           state.b = kOperand.descriptor(tile_address(2048), 0);
           body(state, t);
           if (t < 128) store_accumulator(out.data(), 64, state.d);
         });
  expect_product(out, a, b, 64);
}

void issue(State& s) { prim::wgmma_bf16<64, false, false>(s.d, s.a, s.b, false); }
void finish() {
  prim::wgmma_commit();
  prim::wgmma_wait<0>();
}

const auto kPlain = [](State& s, u32) {
  prim::wgmma_fence();
  issue(s);
  finish();
};

template <u32 kWarps>
void fence_proxy_by(std::uint64_t seed) {
  Flaws flaws;
  flaws.fencing_warps = kWarps;
  multiply(flaws, seed, kPlain);
}
void not_swizzled(std::uint64_t seed) {
  Flaws flaws;
  flaws.swizzle = false;
  multiply(flaws, seed, kPlain);
}
void misaligned_window(std::uint64_t seed) {
  Flaws flaws;
  flaws.shared_offset = 128;
  multiply(flaws, seed, kPlain);
}
void alignment_required(std::uint64_t seed) {
  Flaws flaws;
  flaws.shared_offset = 128;
  multiply(flaws, seed, [](State&, u32) { prim::require_aligned(shared_tile(), 1024); });
}
void two_warps(std::uint64_t seed) {
  Flaws flaws;
  flaws.threads = 64;
  multiply(flaws, seed, kPlain);
}
void no_fence(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) { issue(s), finish(); });
}
void no_fence_after_wait(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    kPlain(s, t);
    s.d[0] = 0;
    issue(s), finish();
  });
}
void read_before_wait(std::uint64_t seed) {
  float copy[128];
  multiply({}, seed, [&](State& s, u32 t) {
    prim::wgmma_fence();
    issue(s);
    prim::wgmma_commit();
    copy[t] = s.d[0];
    prim::wgmma_wait<0>();
    s.d[0] = copy[t];
  });
}
void wait_too_weak(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) {
    float early[32];
    prim::wgmma_fence();
    issue(s);
    prim::wgmma_commit();
    prim::wgmma_wait<1>();
    for (u32 v = 0; v < 32; ++v) early[v] = s.d[v];
    prim::wgmma_wait<0>();
    for (u32 v = 0; v < 32; ++v) s.d[v] = early[v];
  });
}
void written_before_wait(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) {
    prim::wgmma_fence();
    issue(s);
    s.d[5] = 0;
    finish();
  });
}
void fragment_overwritten(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) {
    prim::wgmma_fence();
    prim::wgmma_bf16_rs<64, false>(s.d, s.fragment, s.b, false);
    prim::wgmma_commit();
    s.fragment[1] = 0;
    prim::wgmma_wait<0>();
  });
}
void operand_overwritten(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    prim::wgmma_fence();
    issue(s);
    prim::wgmma_commit();
    shared_tile()[t] = 0;
    prim::wgmma_wait<0>();
  });
}
void never_waited(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) {
    prim::wgmma_fence();
    issue(s);
    prim::wgmma_commit();
  });
}
void never_committed(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) {
    prim::wgmma_fence();
    issue(s);
    prim::wgmma_wait<0>();
  });
}
void other_shape_in_flight(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32) {
    prim::wgmma_fence();
    issue(s);
    auto& part = reinterpret_cast<float(&)[16]>(s.d);
    prim::wgmma_bf16<32, false, false>(part, s.a, s.b, true);
    finish();
  });
}
void different_descriptors(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    if (t >= 64) s.a = s.b;
    kPlain(s, t);
  });
}
void one_warp_alone(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    if (t < 32) kPlain(s, t);
  });
}
void in_divergent_code(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    if (t % 32 < 16) kPlain(s, t);
  });
}
void unused_bits(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    s.b |= u64{1} << 55;
    kPlain(s, t);
  });
}
void base_offset(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    s.b |= u64{1} << 49;
    kPlain(s, t);
  });
}
void driver_swizzle_code(
    std::uint64_t seed) {  // the tensor map's number of the mode in the descriptor
  multiply({}, seed, [](State& s, u32 t) {
    s.b = (s.b & ~(u64{3} << 62)) | u64{1} << 62;
    kPlain(s, t);
  });
}
void outside_shared(std::uint64_t seed) {
  multiply({}, seed, [](State& s, u32 t) {
    s.b = kOperand.descriptor(tile_address(2048), 1);
    kPlain(s, t);
  });
}

/// B as [k][n] of 128 columns lies in two strips: `leading` bytes apart says the descriptor.
template <u32 kLeading>
void strips(std::uint64_t seed) {
  const Operand shape{true, Swizzle::k128, 128, 16};
  const Matrix a(kOperand), b(shape, 1);
  std::vector<float> out(64 * 128);
  launch({.block = {128}, .shared_bytes = kTile + 8192, .seed = seed}, [&] {
    auto* bar = reinterpret_cast<u64*>(prim::dynamic_shared());
    if (prim::thread_idx().x == 0) {
      prim::mbar_init(bar, 1);
      prim::fence_mbar_init();
      prim::mbar_arrive_expect_tx(bar, shape.bytes() + kOperand.bytes());
      load_strips(prim::dynamic_shared() + kTile, b, bar);
      load_strips(prim::dynamic_shared() + kTile + 4096, a, bar);
    }
    prim::sync_block();
    prim::mbar_wait(bar, 0);
    float d[64];
    prim::wgmma_fence();
    prim::wgmma_bf16<128, false, true>(
        d, kOperand.descriptor(tile_address(4096), 0),
        prim::wgmma_descriptor(tile_address(0), kLeading, 1024, Swizzle::k128), false);
    finish();
    store_accumulator(out.data(), 128, d);
  });
  expect_product(out, a, b, 128);
}

// The slot is refilled by a second copy although the product that reads it is not waited for.
void refill_before_wait(std::uint64_t seed) {
  const Matrix a(kOperand), b(kOperand, 1);
  launch({.block = {128}, .shared_bytes = kTile + 4096, .seed = seed}, [&] {
    auto* bar = reinterpret_cast<u64*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    const auto load = [&] {
      prim::mbar_arrive_expect_tx(bar, 4096);
      load_strips(prim::dynamic_shared() + kTile, a, bar);
      load_strips(prim::dynamic_shared() + kTile + 2048, b, bar);
    };
    if (t == 0) prim::mbar_init(bar, 1), prim::fence_mbar_init(), load();
    prim::sync_block();
    prim::mbar_wait(bar, 0);
    float d[32];
    prim::wgmma_fence();
    prim::wgmma_bf16<64, false, false>(d, kOperand.descriptor(tile_address(0), 0),
                                       kOperand.descriptor(tile_address(2048), 0), false);
    prim::wgmma_commit();
    prim::sync_block();
    if (t == 0) load();
    prim::wgmma_wait<0>();
    prim::mbar_wait(bar, 1);
  });
}

const Planted kBugs[] = {
    {"no fence.proxy.async before wgmma", fence_proxy_by<0>, "wrong values", true},
    {"no fence.proxy.async in one warp", fence_proxy_by<3>, nullptr, true},
    {"alignment required", alignment_required, "not aligned to 1024"},
    {"tile not swizzled", not_swizzled, "wrong values"},
    {"tile at a multiple of 128", misaligned_window, "must begin on a multiple of 256"},
    {"wgmma by two warps", two_warps, "no four warps"},
    {"no wgmma_fence", no_fence, "without a wgmma_fence"},
    {"no wgmma_fence after a wait", no_fence_after_wait, "without a wgmma_fence"},
    {"accumulator read before the wait", read_before_wait, "wrong values"},
    {"wgmma_wait too weak", wait_too_weak, "wrong values"},
    {"accumulator written before the wait", written_before_wait, "in flight were written"},
    {"A registers overwritten before the wait", fragment_overwritten, "in flight were written"},
    {"operand overwritten before the wait", operand_overwritten, "overwritten before the wait",
     true},
    {"wgmma never waited for", never_waited, "never waited for"},
    {"wgmma never committed", never_committed, "never committed"},
    {"accumulator of another shape in flight", other_shape_in_flight, "another shape"},
    {"warps with different descriptors", different_descriptors, "different descriptors"},
    {"wgmma by one warp of four", one_warp_alone, "not all four warps"},
    {"wgmma in divergent code", in_divergent_code, "deadlock: {64 threads in wgmma.fence"},
    {"unused descriptor bits", unused_bits, "unused bits"},
    {"base offset", base_offset, "base offset 0"},
    {"the driver's code of the swizzle", driver_swizzle_code, "outside"},
    {"operand past shared memory", outside_shared, "outside"},
    {"leading bytes of a K-major operand", strips<16>, "wrong values"},
    {"leading and stride exchanged", strips<1024>, "wrong values"},
    {"slot refilled before the wait", refill_before_wait, "overwritten before the wait", true},
};

}  // namespace

List<Planted> wgmma_bugs() { return {kBugs, sizeof kBugs / sizeof *kBugs}; }

}  // namespace simt_test
