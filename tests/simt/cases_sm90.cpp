// mbarriers, tensor copies, asynchronous remote stores, the register pool: correct kernels.
#include <vector>

#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"
#include "tests/simt/cases.h"
#include "tests/simt/tensor_cases.h"

namespace simt_test {
namespace {

using prim::bf16;
using prim::Swizzle;
using prim::TensorMap;
using prim::u16;
using prim::u32;
using prim::u64;
using simt::launch;

u64* shared_barriers() { return reinterpret_cast<u64*>(prim::dynamic_shared()); }

void parities(std::uint64_t seed) {
  launch({.block = {1}, .shared_bytes = 64, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    prim::mbar_init(bar, 2);
    prim::fence_mbar_init();
    expect(prim::mbar_test(bar, 1) && !prim::mbar_test(bar, 0), "fresh barrier");
    prim::mbar_arrive(bar);
    expect(!prim::mbar_test(bar, 0), "one arrival of two");
    prim::mbar_arrive(bar);
    expect(prim::mbar_test(bar, 0) && !prim::mbar_test(bar, 1), "after one phase");
    prim::mbar_expect_tx(bar, 16);
    prim::mbar_arrive(bar);
    prim::mbar_arrive_expect_tx(bar, 0);
    expect(!prim::mbar_test(bar, 1), "arrivals are complete, bytes are not");
    alignas(16) float source[4] = {1, 2, 3, 4};
    auto* tile = reinterpret_cast<float*>(prim::dynamic_shared() + 16);
    prim::bulk_load(tile, source, 16, bar);
    prim::mbar_wait(bar, 1);
    expect(tile[3] == 4 && !prim::mbar_test(bar, 0), "after two phases");
    prim::mbar_inval(bar);
    prim::mbar_init(bar, 1);
    expect(prim::mbar_test(bar, 1), "a new barrier in the same place");
  });
}

void barrier_ring(std::uint64_t seed) {  // one warp produces for two, through a ring of two slots
  constexpr u32 kSlots = 2, kUses = 7;
  std::vector<u32> out(64 * kUses);
  launch({.block = {96}, .shared_bytes = 512, .seed = seed}, [&] {
    u64 *full = shared_barriers(), *empty = full + kSlots;
    auto* slots = reinterpret_cast<u32*>(full + 8);
    const u32 t = prim::thread_idx().x;
    if (t == 0) {
      for (u32 s = 0; s < kSlots; ++s)
        prim::mbar_init(full + s, 32), prim::mbar_init(empty + s, 64);
      prim::fence_mbar_init();
    }
    prim::sync_block();
    for (u32 i = 0; i < kUses; ++i) {
      const u32 s = i % kSlots, parity = i / kSlots & 1;
      if (t < 32) {
        prim::mbar_wait(empty + s, parity ^ 1);
        slots[32 * s + t] = 100 * i + t;
        prim::mbar_arrive(full + s);
      } else {
        prim::mbar_wait(full + s, parity);
        out[64 * i + t - 32] = slots[32 * s + (t + 9) % 32];
        prim::mbar_arrive(empty + s);
      }
    }
  });
  for (u32 i = 0; i < out.size(); ++i)
    expect(out[i] == 100 * (i / 64) + (i + 9) % 32, "ring of mbarriers", i);
}

template <bool kCounted>
void copies_arrive(std::uint64_t seed) {  // cp.async by 32 threads, waited for by 32 others
  std::vector<float> in(128), out(32);
  for (u32 i = 0; i < in.size(); ++i) in[i] = small_value(i);
  launch({.block = {64}, .shared_bytes = 1024, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    auto* tile = reinterpret_cast<float*>(bar + 2);
    const u32 t = prim::thread_idx().x;
    if (t == 0) prim::mbar_init(bar, 32), prim::fence_mbar_init();
    prim::sync_block();
    if (t < 32) {
      prim::cp_async16(tile + 4 * t, in.data() + 4 * t);
      if (kCounted) {
        prim::cp_async_mbar_arrive_noinc(bar);
      } else {
        prim::cp_async_mbar_arrive(bar);
        prim::mbar_arrive(bar);
      }
      return;
    }
    prim::mbar_wait(bar, 0);
    out[t - 32] = tile[4 * (t - 32) + 3];
  });
  for (u32 i = 0; i < 32; ++i) expect(out[i] == in[4 * i + 3], "cp.async and mbarrier", i);
}

/// Loads one box and returns shared memory as it lies.
template <class Load>
std::vector<u16> box_bytes(const LaunchOptions& options, u32 bytes, Load load) {
  std::vector<u16> out(bytes / 2);
  launch({.block = {32},
          .shared_bytes = kTile + bytes,
          .seed = options.seed,
          .shared_offset = options.offset},
         [&] {
           u64* bar = shared_barriers();
           auto* tile = reinterpret_cast<u16*>(prim::dynamic_shared() + kTile);
           const u32 t = prim::thread_idx().x;
           if (t == 0) {
             prim::mbar_init(bar, 1);
             prim::fence_mbar_init();
             prim::mbar_arrive_expect_tx(bar, bytes);
             load(tile, bar);
           }
           prim::sync_warp();
           prim::mbar_wait(bar, 0);
           for (u32 i = t; i < bytes / 2; i += 32) out[i] = tile[i];
         });
  return out;
}

void swizzles(std::uint64_t seed) {
  for (const u32 offset : {0U, 128U, 640U}) {
    for (const Swizzle mode : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
      const u32 width = prim::swizzle_bytes(mode), columns = width / 2;
      std::vector<u16> in(16 * columns);
      for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i);
      const TensorMap map = matrix_map(in.data(), columns, 16, columns, columns, 16, mode);
      const auto out = box_bytes({seed, offset}, 16 * width, [&](void* tile, u64* bar) {
        prim::tma_prefetch(map);
        prim::tma_load_2d(tile, map, 0, 0, bar);
      });
      for (u32 i = 0; i < in.size(); ++i) {
        const u32 at = prim::swizzled(1024 + kTile + offset + 2 * i, mode) - 1024 - kTile - offset;
        expect(out[at / 2] == i, "swizzled box", i);
      }
      if (offset != 0) continue;
      // Rows and columns of the programming guide's tables.
      if (mode == Swizzle::k128) {
        expect(out[420 / 2] == 3 * 64 + 10, "128-byte swizzle");
        const u32 order[] = {3, 2, 1, 0, 7, 6, 5, 4};
        for (u32 c = 0; c < 8; ++c)
          expect(out[3 * 64 + 8 * c] == 3 * 64 + 8 * order[c], "row 3", c);
      }
      if (mode == Swizzle::k64) expect(out[336 / 2] == 5 * 32 + 24, "64-byte swizzle");
      if (mode == Swizzle::k32) expect(out[162 / 2] == 5 * 16 + 9, "32-byte swizzle");
    }
  }
}

void load_edges(
    std::uint64_t seed) {  // boxes that hang over every edge complete by all their bytes
  constexpr u32 kWidth = 100, kPitch = 104, kHeight = 70;
  std::vector<u16> in(kPitch * kHeight, 9999);
  for (u32 y = 0; y < kHeight; ++y)
    for (u32 x = 0; x < kWidth; ++x) in[y * kPitch + x] = static_cast<u16>(1 + y * kWidth + x);
  const TensorMap map = matrix_map(in.data(), kWidth, kHeight, kPitch, 64, 64, Swizzle::k128);
  const int corners[][2] = {{64, 64}, {-3, -5}, {0, 0}, {200, 0}, {-64, 10}, {37, 69}};
  for (const auto& corner : corners) {
    const auto out = box_bytes({seed, 0}, 8192, [&](void* tile, u64* bar) {
      prim::tma_load_2d(tile, map, corner[0], corner[1], bar);
    });
    for (int r = 0; r < 64; ++r) {
      for (int c = 0; c < 64; ++c) {
        const int x = corner[0] + c, y = corner[1] + r;
        const bool inside =
            x >= 0 && x < static_cast<int>(kWidth) && y >= 0 && y < static_cast<int>(kHeight);
        const u32 at = prim::swizzled(static_cast<u32>(128 * r + 2 * c), Swizzle::k128) / 2;
        expect(out[at] == (inside ? 1 + y * static_cast<int>(kWidth) + x : 0), "box over the edge",
               64 * r + c);
      }
    }
  }
}

/// A tensor of four dimensions (innermost first) and what lies at a place of it.
struct Tensor4 {
  u32 size[4], box[4];
  std::vector<u16> data;
  Tensor4() : size{40, 3, 5, 2}, box{16, 2, 3, 2}, data(40 * 3 * 5 * 2) {}
  TensorMap map(u32 rank, Swizzle mode) {
    prim::TensorMapSpec spec;
    spec.base = data.data();
    spec.rank = rank;
    spec.swizzle = mode;
    u64 stride = 2;
    for (u32 i = 0; i < rank; ++i) {
      spec.dims[i] = size[i];
      spec.strides[i] = stride;
      spec.box[i] = box[i];
      stride *= size[i];
    }
    return prim::make_tensor_map(spec);
  }
  /// Index of the element `i` of a box at `c`, or -1 outside.
  long index(u32 i, const int* c) const {
    long place = 0, stride = 1;
    for (u32 d = 0; d < 4; ++d) {
      const long at = c[d] + static_cast<long>(i % box[d]);
      if (at < 0 || at >= static_cast<long>(size[d])) return -1;
      place += at * stride;
      stride *= size[d];
      i /= box[d];
    }
    return place;
  }
};

void more_dimensions(std::uint64_t seed) {
  Tensor4 tensor;
  for (u32 i = 0; i < tensor.data.size(); ++i) tensor.data[i] = static_cast<u16>(i + 1);
  const int c[] = {32, 2, -1, 1};
  const TensorMap map4 = tensor.map(4, Swizzle::k32), map3 = tensor.map(3, Swizzle::kNone);
  const auto four = box_bytes({seed, 0}, 2 * 192, [&](void* tile, u64* bar) {
    prim::tma_load_4d(tile, map4, c[0], c[1], c[2], c[3], bar);
  });
  for (u32 i = 0; i < 192; ++i) {
    const long from = tensor.index(i, c);
    expect(four[prim::swizzled(2 * i, Swizzle::k32) / 2] == (from < 0 ? 0 : from + 1), "4 dims", i);
  }
  const auto three = box_bytes({seed, 0}, 2 * 96, [&](void* tile, u64* bar) {
    prim::tma_load_3d(tile, map3, c[0], c[1], c[2], bar);
  });
  const int plane[] = {c[0], c[1], c[2], 0};
  for (u32 i = 0; i < 96; ++i) {
    const long from = tensor.index(i, plane);
    expect(three[i] == (from < 0 ? 0 : from + 1), "3 dims", i);
  }
}

void store_boxes(
    std::uint64_t seed) {  // clipped at the end of every dimension, two groups in flight
  Tensor4 tensor;
  const TensorMap map4 = tensor.map(4, Swizzle::k32), map3 = tensor.map(3, Swizzle::kNone);
  std::vector<u16> flat(60 * 8 * 8);
  const TensorMap map2 = matrix_map(flat.data(), 60, 60, 64, 32, 16, Swizzle::k64);
  const int c4[] = {24, 1, 2, 1}, c3[] = {0, 0, 0, 0};
  launch({.block = {64}, .shared_bytes = 4096, .seed = seed}, [&] {
    auto* s = reinterpret_cast<u16*>(prim::dynamic_shared());
    const u32 t = prim::thread_idx().x;
    for (u32 i = t; i < 192; i += 64)
      s[prim::swizzled(2 * i, Swizzle::k32) / 2] = static_cast<u16>(i + 1);
    for (u32 i = t; i < 96; i += 64) s[512 + i] = static_cast<u16>(i + 1);
    for (u32 i = t; i < 512; i += 64)
      s[1024 + prim::swizzled(2 * i, Swizzle::k64) / 2] = static_cast<u16>(i + 1);
    prim::fence_proxy_async();
    prim::sync_block();
    if (t < 32 && prim::elect_one()) {
      prim::tma_store_4d(map4, s, c4[0], c4[1], c4[2], c4[3]);
      prim::tma_store_commit();
      prim::tma_store_3d(map3, s + 512, c3[0], c3[1], c3[2]);
      prim::tma_store_2d(map2, s + 1024, 32, 50);
      prim::tma_store_commit();
      prim::tma_store_wait_read<1>();
      s[0] = 7;  // read by the first group alone
      prim::tma_store_wait<1>();
      expect(tensor.data[static_cast<u32>(tensor.index(0, c4))] == 1, "written after the wait");
      prim::tma_store_wait_read<0>();
    }
  });
  std::vector<u16> want(tensor.data.size());
  for (u32 i = 0; i < 192; ++i)
    if (tensor.index(i, c4) >= 0)
      want[static_cast<u32>(tensor.index(i, c4))] = static_cast<u16>(i + 1);
  for (u32 i = 0; i < 96; ++i)
    want[static_cast<u32>(tensor.index(i, c3))] = static_cast<u16>(i + 1);
  for (u32 i = 0; i < want.size(); ++i) expect(tensor.data[i] == want[i], "stored boxes", i);
  for (u32 i = 0; i < flat.size(); ++i) {
    const u32 x = i % 64, y = i / 64;
    const bool inside = x >= 32 && x < 60 && y >= 50 && y < 60;
    expect(flat[i] == (inside ? (y - 50) * 32 + (x - 32) + 1 : 0), "clipped store", i);
  }
}

void remote_stores(std::uint64_t seed) {  // every block sends to the next one, in three ways
  std::vector<u32> out(4 * 96);
  launch({.grid = {4}, .block = {32}, .shared_bytes = 2048, .cluster = 4, .seed = seed}, [&] {
    u64* bar = shared_barriers();
    auto* s = reinterpret_cast<u32*>(bar + 2);
    const u32 t = prim::thread_idx().x, rank = prim::cluster_rank(), next = (rank + 1) % 4;
    if (t == 0) prim::mbar_init(bar, 1), prim::mbar_init(bar + 1, 32), prim::fence_mbar_init();
    prim::cluster_sync();
    if (t == 0) prim::mbar_arrive_expect_tx(bar, 3 * 128);
    s[96 + t] = 3000 + 100 * rank + t;
    prim::fence_proxy_async();
    prim::sync_block();
    prim::st_async(s + t, next, 1000 + 100 * rank + t, bar);
    if (t < 8) {
      const u32 base = 2000 + 100 * rank + 4 * t;
      prim::st_async_x4(s + 32 + 4 * t, next, {base, base + 1, base + 2, base + 3}, bar);
    }
    if (t == 0) prim::bulk_copy_remote(s + 64, next, s + 96, 128, bar);
    prim::mbar_wait_cluster(bar, 0);
    for (u32 i = 0; i < 3; ++i) out[96 * rank + 32 * i + t] = s[32 * i + t];
    // Ordinary stores, published by remote arrivals.
    prim::remote_store_x4(s + 128 + 4 * t, next, {t, rank, 7, 8});
    prim::mbar_arrive_remote(bar + 1, next);
    prim::mbar_wait_cluster(bar + 1, 0);
    const u32* got = s + 128 + 4 * ((t + 5) % 32);
    expect(got[0] == (t + 5) % 32 && got[1] == (rank + 3) % 4 && got[3] == 8, "remote_store_x4", t);
    prim::cluster_sync();
  });
  for (u32 i = 0; i < out.size(); ++i)
    expect(out[i] == 1000 * (i % 96 / 32 + 1) + 100 * ((i / 96 + 3) % 4) + i % 32, "remote", i);
}

// Two blocks of a cluster load halves of a tile and send them to both, three times through one slot.
void multicast(std::uint64_t seed) {
  constexpr u32 kSteps = 3;
  std::vector<u16> in(kSteps * 128 * 64);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i * 7);
  const TensorMap map = matrix_map(in.data(), 64, kSteps * 128, 64, 64, 64, Swizzle::k128);
  std::vector<u16> out(2 * in.size());
  launch({.grid = {2}, .block = {64}, .shared_bytes = kTile + 16384, .cluster = 2, .seed = seed},
         [&] {
           u64 *full = shared_barriers(), *empty = full + 1;
           auto* tile = reinterpret_cast<u16*>(prim::dynamic_shared() + kTile);
           const u32 t = prim::thread_idx().x, rank = prim::cluster_rank();
           if (t == 0) {
             prim::mbar_init(full, 1);
             prim::mbar_init(empty, 2);  // a consumer warp of each block
             prim::fence_mbar_init();
           }
           prim::cluster_sync();
           for (u32 i = 0; i < kSteps; ++i) {
             if (t == 0) {
               prim::mbar_wait_cluster(empty, (i & 1) ^ 1);
               prim::mbar_arrive_expect_tx(full, 16384);
               prim::tma_load_2d_multicast(tile + 4096 * rank, map, 0,
                                           static_cast<int>(128 * i + 64 * rank), full, 3);
             }
             if (t >= 32) {
               prim::mbar_wait(full, i & 1);
               for (u32 e = t - 32; e < 8192; e += 32) {
                 const u32 at = prim::swizzled(2 * e, Swizzle::k128) / 2;
                 out[rank * in.size() + 8192 * i + e] = tile[at];
               }
               prim::sync_warp();
               if (t < 34) prim::mbar_arrive_remote(empty, t - 32);
             }
             prim::sync_warp();
           }
           prim::cluster_sync();
         });
  for (u32 i = 0; i < out.size(); ++i) expect(out[i] == in[i % in.size()], "multicast", i);
}

void register_pool(std::uint64_t seed) {  // 24 + 240 + 240 registers fit into three times 168
  u32 passed = 0;
  launch({.block = {384}, .seed = seed, .registers_per_thread = 168}, [&] {
    if (prim::thread_idx().x < 128) {
      prim::set_max_registers_down<24>();
    } else {
      prim::set_max_registers_up<240>();
    }
    prim::atomic_add(&passed, 1);
  });
  expect(passed == 384, "threads past setmaxnreg");
}

/// Whether the message of make_tensor_map names `field` when `change` spoils a good description.
template <class Change>
void refused(const char* field, Change change) {
  alignas(16) static u16 data[64 * 64];
  prim::TensorMapSpec spec{data, 2, {64, 64}, {0, 128}, {64, 64}, 2, Swizzle::k128};
  prim::make_tensor_map(spec);
  change(spec);
  try {
    prim::make_tensor_map(spec);
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()).find(field) != std::string::npos, error.what());
    return;
  }
  expect(false, field);
}

void tensor_map_rules(std::uint64_t) {
  using Spec = prim::TensorMapSpec;
  refused("rank", [](Spec& s) { s.rank = 0; });
  refused("rank", [](Spec& s) { s.rank = 6; });
  refused("element_bytes", [](Spec& s) { s.element_bytes = 8; });
  refused("base", [](Spec& s) { s.base = nullptr; });
  refused("base", [](Spec& s) { s.base = static_cast<u16*>(s.base) + 1; });
  refused("dims[1]", [](Spec& s) { s.dims[1] = 0; });
  refused("dims[0]", [](Spec& s) { s.dims[0] = (u64{1} << 32) + 1; });
  refused("strides[0]", [](Spec& s) { s.strides[0] = 4; });
  refused("strides[1]", [](Spec& s) { s.strides[1] = 120; });
  refused("strides[1]", [](Spec& s) { s.strides[1] = 0; });
  refused("strides[1]", [](Spec& s) { s.strides[1] = u64{1} << 40; });
  refused("box[1]", [](Spec& s) { s.box[1] = 257; });
  refused("box[1]", [](Spec& s) { s.box[1] = 0; });
  refused("box[0]", [](Spec& s) { s.box[0] = 4; });
  refused("box[0]", [](Spec& s) { s.box[0] = 128; });
  refused("box[0]", [](Spec& s) { s.swizzle = Swizzle::k64; });
  refused("box[0]", [](Spec& s) { s.box[0] = 12, s.swizzle = Swizzle::kNone; });
  refused("box", [](Spec& s) {
    s.box[0] = s.box[1] = 256, s.element_bytes = 4, s.swizzle = Swizzle::kNone;
  });
}

const Case kCases[] = {
    {"mbarrier parities and bytes", parities},
    {"ring of mbarriers", barrier_ring},
    {"cp.async that arrives", copies_arrive<false>},
    {"cp.async that arrives, counted", copies_arrive<true>},
    {"swizzles", swizzles},
    {"boxes over the edge", load_edges},
    {"three and four dimensions", more_dimensions},
    {"tensor stores", store_boxes},
    {"asynchronous remote stores", remote_stores},
    {"multicast", multicast},
    {"register pool", register_pool},
    {"rules of tensor maps", tensor_map_rules},
};

}  // namespace

List<Case> sm90_cases() { return {kCases, sizeof kCases / sizeof *kCases}; }

}  // namespace simt_test
