// Tensor copies: layouts, edges, stores, the rules of tensor maps.
#include <vector>

#include "cuda/prim/prim.h"
#include "cuda/prim/tensor_map.h"
#include "tests/simt/cases.h"
#include "tests/simt/tensor_cases.h"

namespace simt_test {
namespace {

using prim::Swizzle;
using prim::TensorMap;
using prim::u16;
using prim::u32;
using prim::u64;
using simt::launch;

u64* shared_barriers() { return reinterpret_cast<u64*>(prim::dynamic_shared()); }

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
  const int corners[][2] = {{64, 64}, {-8, -5}, {0, 0}, {200, 0}, {-64, 10}, {40, 69}};
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
  const TensorMap map2 = matrix_map(flat.data(), 56, 60, 64, 32, 16, Swizzle::k64);
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
    const bool inside = x >= 32 && x < 56 && y >= 50 && y < 60;
    expect(flat[i] == (inside ? (y - 50) * 32 + (x - 32) + 1 : 0), "clipped store", i);
  }
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
    {"swizzles", swizzles},
    {"boxes over the edge", load_edges},
    {"three and four dimensions", more_dimensions},
    {"tensor stores", store_boxes},
    {"rules of tensor maps", tensor_map_rules},
};

}  // namespace

List<Case> tensor_cases() { return {kCases, sizeof kCases / sizeof *kCases}; }

}  // namespace simt_test
