// Tensor copies (sm_90a): swizzles, boxes over the edge, every rank, stores, multicast.
#include "tests/cuda/conformance.h"

namespace conformance {
namespace {

constexpr u32 kOffset = 128;  // of the second tile from a multiple of 1024

struct Load {
  TensorMap map;
  int at[4];
  u32 rank, bytes, offset;
  u16* out;
};

/// One box, as it lies in shared memory.
KERNEL_FUNCTION(128) load_kernel(const GRID_CONSTANT Load p) {
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  u16* tile = reinterpret_cast<u16*>(tiles() + p.offset);
  const u32 t = prim::thread_idx().x;
  prim::require_aligned(tiles(), 1024);
  if (t == 0) {
    prim::tma_prefetch(p.map);
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
    prim::mbar_arrive_expect_tx(bar, p.bytes);
    if (p.rank == 2) prim::tma_load_2d(tile, p.map, p.at[0], p.at[1], bar);
    if (p.rank == 3) prim::tma_load_3d(tile, p.map, p.at[0], p.at[1], p.at[2], bar);
    if (p.rank == 4) prim::tma_load_4d(tile, p.map, p.at[0], p.at[1], p.at[2], p.at[3], bar);
  }
  prim::sync_block();
  prim::mbar_wait(bar, 0);
  for (u32 i = t; i < p.bytes / 2; i += 128) p.out[i] = tile[i];
#endif
}

void load(Dump& dump, const TensorMap& map, u32 rank, const int* at, u32 bytes, u32 offset = 0) {
  Buffer<u16> out(bytes / 2);
  Load p{map, {at[0], at[1], at[2], at[3]}, rank, bytes, offset, out.upload()};
  run(load_kernel, {1, 128, kTile + offset + bytes}, p);
  dump.exact(out.fetch());
}

void swizzle(Dump& dump, Swizzle mode, u32 offset) {
  const u32 width = prim::swizzle_bytes(mode), columns = width / 2;
  Buffer<u16> in(64 * columns);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i + 1);
  const TensorMap map = matrix_map(in.upload(), columns, 64, columns, columns, 64, mode);
  const int at[4] = {};
  load(dump, map, 2, at, 64 * width, offset);
}

void edge(Dump& dump, int x, int y) {  // of 100 x 70 numbers
  constexpr u32 kPitch = 104, kHeight = 70;
  Buffer<u16> in(kPitch * kHeight);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i + 1);
  const TensorMap map = matrix_map(in.upload(), 100, kHeight, kPitch, 64, 64, Swizzle::k128);
  const int at[4] = {x, y};
  load(dump, map, 2, at, 8192);
}

/// The tensor begins 16 bytes behind a multiple of 128.
void shifted_base(Dump& dump) {
  Buffer<u16> in(8 + 72 * 64);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i + 1);
  const TensorMap map = matrix_map(in.upload() + 8, 64, 64, 72, 64, 64, Swizzle::k128);
  const int at[4] = {};
  load(dump, map, 2, at, 8192);
}

void wide_elements(Dump& dump) {  // four bytes
  Buffer<u16> in(2 * 40 * 24);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i + 1);
  const TensorMap map =
      prim::make_tensor_map({in.upload(), 2, {38, 24}, {4, 160}, {32, 16}, 4, Swizzle::k128});
  const int at[4] = {16, 12};
  load(dump, map, 2, at, 2048);
}

/// 40 x 3 x 5 x 2 numbers, innermost first, in boxes of 16 x 2 x 3 x 2.
constexpr u32 kSize[] = {40, 3, 5, 2}, kBox[] = {16, 2, 3, 2};
TensorMap solid_map(u16* base, u32 rank, Swizzle mode) {
  prim::TensorMapSpec spec;
  spec.base = base;
  spec.rank = rank;
  spec.swizzle = mode;
  u64 stride = 2;
  for (u32 i = 0; i < rank; ++i) {
    spec.dims[i] = kSize[i];
    spec.strides[i] = stride;
    spec.box[i] = kBox[i];
    stride *= kSize[i];
  }
  return prim::make_tensor_map(spec);
}

void solid(Dump& dump, u32 rank) {
  Buffer<u16> in(40 * 3 * 5 * 2);
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(i + 1);
  const int at[4] = {32, 2, -1, 1};
  const TensorMap map = solid_map(in.upload(), rank, rank == 4 ? Swizzle::k32 : Swizzle::kNone);
  load(dump, map, rank, at, rank == 4 ? 384 : 192);
}

// Stores ------------------------------------------------------------------------------------------------------------------

struct Store {
  TensorMap map;
  int at[4];
  u32 rank, words;
};

KERNEL_FUNCTION(64) store_kernel(const GRID_CONSTANT Store p) {
#if PRIM_HAS_SM90A
  u16* tile = reinterpret_cast<u16*>(tiles());
  const u32 t = prim::thread_idx().x;
  for (u32 i = t; i < p.words; i += 64) tile[i] = static_cast<u16>(i + 1);
  prim::fence_proxy_async();
  prim::sync_block();
  if (t >= 32 || !prim::elect_one()) return;
  if (p.rank == 2) prim::tma_store_2d(p.map, tile, p.at[0], p.at[1]);
  if (p.rank == 3) prim::tma_store_3d(p.map, tile, p.at[0], p.at[1], p.at[2]);
  if (p.rank == 4) prim::tma_store_4d(p.map, tile, p.at[0], p.at[1], p.at[2], p.at[3]);
  prim::tma_store_commit();
  prim::tma_store_wait_read<0>();
  prim::tma_store_wait<0>();
#endif
}

void store(Dump& dump, Buffer<u16>& target, const Store& p) {
  run(store_kernel, {1, 64, kTile + 2 * p.words}, p);
  dump.exact(target.fetch());
}

void store_plane(Dump& dump, Swizzle mode) {  // 56 x 60 numbers, clipped at both ends
  Buffer<u16> target(64 * 60);
  const u32 columns = mode == Swizzle::kNone ? 32 : prim::swizzle_bytes(mode) / 2;
  const TensorMap map = matrix_map(target.upload(), 56, 60, 64, columns, 16, mode);
  store(dump, target, {map, {56 - static_cast<int>(columns) + 8, 50}, 2, 16 * columns});
}

void store_solid(Dump& dump, u32 rank) {
  Buffer<u16> target(40 * 3 * 5 * 2);
  const TensorMap map = solid_map(target.upload(), rank, rank == 4 ? Swizzle::k32 : Swizzle::kNone);
  store(dump, target, {map, {32, 2, 3, 1}, rank, rank == 4 ? 192U : 96U});
}

struct Round {
  TensorMap from, to;
  u16* plain;
  u16* out;
};

/// Written by threads and read by a tensor copy; stored by one and read by threads; two groups of stores in flight.
KERNEL_FUNCTION(128) round_trip_kernel(const GRID_CONSTANT Round p) {
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  u16* tile = reinterpret_cast<u16*>(tiles());
  const u32 t = prim::thread_idx().x;
  for (u32 i = t; i < 4096; i += 128) p.plain[i] = static_cast<u16>(3 * i + 1);
  prim::fence_proxy_async_all();
  if (t == 0) {
    prim::mbar_init(bar, 1);
    prim::fence_mbar_init();
  }
  prim::sync_block();
  if (t == 0) {
    prim::mbar_arrive_expect_tx(bar, 8192);
    prim::tma_load_2d(tile, p.from, 0, 0, bar);
  }
  prim::mbar_wait(bar, 0);
  for (u32 i = t; i < 4096; i += 128) tile[i] = static_cast<u16>(tile[i] + 1);
  prim::fence_proxy_async();
  prim::sync_block();
  if (t == 0) {
    for (u32 half = 0; half < 2; ++half) {
      prim::tma_store_2d(p.to, tile + 2048 * half, 0, static_cast<int>(32 * half));
      prim::tma_store_commit();
    }
    prim::tma_store_wait<1>();
    p.out[0] = p.out[1];  // row 0 is written
    prim::tma_store_wait<0>();
  }
#endif
}

void round_trip(Dump& dump) {
  Buffer<u16> plain(4096), out(4096);
  Round p{};
  p.plain = plain.upload();
  p.out = out.upload();
  p.from = matrix_map(p.plain, 64, 64, 64, 64, 64, Swizzle::k128);
  p.to = matrix_map(p.out, 64, 64, 64, 64, 32, Swizzle::k128);
  run(round_trip_kernel, {1, 128, kTile + 8192}, p);
  dump.exact(out.fetch());
}

// Multicast ---------------------------------------------------------------------------------------------------------------

constexpr u32 kSteps = 3;
struct Multicast {
  TensorMap map;
  u32 rank;
  u16* out;
};

/// Two blocks load halves of a tile and send them to both, three times through one slot.
KERNEL_FUNCTION(64) multicast_kernel(const GRID_CONSTANT Multicast p) {
#if PRIM_HAS_SM90A
  u64 *full = barriers(), *empty = full + 1;
  u16* tile = reinterpret_cast<u16*>(tiles());
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
      u16* half = tile + 4096 * rank;
      const int y = static_cast<int>(128 * i + 64 * rank);
      if (p.rank == 2) prim::tma_load_2d_multicast(half, p.map, 0, y, full, 3);
      if (p.rank == 3) prim::tma_load_3d_multicast(half, p.map, 0, y, 0, full, 3);
      if (p.rank == 4) prim::tma_load_4d_multicast(half, p.map, 0, y, 0, 0, full, 3);
    }
    if (t >= 32) {
      prim::mbar_wait(full, i & 1);
      for (u32 e = t - 32; e < 8192; e += 32) p.out[(rank * kSteps + i) * 8192 + e] = tile[e];
      prim::fence_proxy_async();
      prim::sync_warp();
      if (t < 34) prim::mbar_arrive_remote(empty, t - 32);
    }
    prim::sync_warp();
  }
  prim::cluster_sync();
#endif
}

void multicast(Dump& dump, u32 rank) {
  Buffer<u16> in(kSteps * 128 * 64), out(2 * in.size());
  for (u32 i = 0; i < in.size(); ++i) in[i] = static_cast<u16>(mixed(i));
  const u64 all = 2 * in.size();
  const TensorMap map = prim::make_tensor_map({in.upload(),
                                               rank,
                                               {64, kSteps * 128, 1, 1},
                                               {2, 128, all, all},
                                               {64, 64, 1, 1},
                                               2,
                                               Swizzle::k128});
  run(multicast_kernel, {2, 64, kTile + 16384, 2}, Multicast{map, rank, out.upload()});
  dump.exact(out.fetch());
}

}  // namespace

void add_tensor_cases(Cases& cases) {
  const auto add = [&](const std::string& name, std::function<void(Dump&)> body) {
    cases.push_back({name, Needs::kSm90a, std::move(body)});
  };
  for (const Swizzle mode : kModes) {
    const std::string suffix = mode_name(mode);
    add("tma_load_" + suffix, [=](Dump& dump) { swizzle(dump, mode, 0); });
    add("tma_load_shifted_" + suffix, [=](Dump& dump) { swizzle(dump, mode, kOffset); });
    add("tma_store_" + suffix, [=](Dump& dump) { store_plane(dump, mode); });
  }
  const int corners[][2] = {{64, 64}, {-8, -5}, {0, 0}, {200, 0}, {0, 300}, {-64, -64}, {40, 69}};
  for (const auto& corner : corners) {
    const int x = corner[0], y = corner[1];
    add("tma_load_at_" + std::to_string(x) + "_" + std::to_string(y),
        [=](Dump& dump) { edge(dump, x, y); });
  }
  add("tma_load_base_16", shifted_base);
  add("tma_load_32bit", wide_elements);
  for (const u32 rank : {3U, 4U}) {
    add("tma_load_rank_" + std::to_string(rank), [=](Dump& dump) { solid(dump, rank); });
    add("tma_store_rank_" + std::to_string(rank), [=](Dump& dump) { store_solid(dump, rank); });
  }
  add("tma_round_trip", round_trip);
  for (const u32 rank : {2U, 3U, 4U})
    add("tma_multicast_rank_" + std::to_string(rank), [=](Dump& dump) { multicast(dump, rank); });
}

}  // namespace conformance
