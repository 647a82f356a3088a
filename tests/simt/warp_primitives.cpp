// Host bodies of the sm_80 primitives: addresses, cp.async, ldmatrix, mma.
#include <algorithm>
#include <cstring>

#include "cuda/prim/host.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

namespace simt {

std::uint32_t shared_address(const void* pointer, std::size_t bytes) {
  const Block* block = current->block;
  const auto offset =
      reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(block->shared);
  if (offset >= block->shared_bytes) fail("the address is not in this block's shared memory");
  if (offset + bytes > block->shared_bytes) fail("access past the end of shared memory");
  return block->window + static_cast<std::uint32_t>(offset);
}

char* shared_pointer(Block* block, std::uint32_t address, std::size_t bytes) {
  if (address < block->window || address - block->window + bytes > block->shared_bytes) {
    fail("shared address outside the block's shared memory");
  }
  return block->shared + (address - block->window);
}

void land_copy(CopyOp& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memset(copy.dst, 0, copy.bytes);
  if (copy.valid != 0) std::memcpy(copy.dst, copy.src, copy.valid);
}

}  // namespace simt

namespace prim {

using simt::current;
using simt::Quiet;

u32 shared_u32(const void* pointer) {
  Quiet quiet;
  return simt::shared_address(pointer, 1);
}

void require_aligned(const void* shared, u32 bytes) {
  Quiet quiet;
  if (simt::shared_address(shared, 1) % bytes != 0)
    simt::fail("shared memory is not aligned to " + std::to_string(bytes) + " bytes");
}

// The destination holds NaN from the issue to the wait, so early readers see it and early writers are overwritten.
static void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, const char* what) {
  Quiet quiet;
  simt::shared_address(dst, bytes);
  if (reinterpret_cast<std::uintptr_t>(dst) % bytes != 0 ||
      reinterpret_cast<std::uintptr_t>(src) % bytes != 0) {
    simt::fail(std::string(what) + ": misaligned address");
  }
  if (valid > bytes) simt::fail(std::string(what) + ": the source size exceeds the copy size");
  simt::touch_write(dst, bytes);
  if (valid != 0) simt::touch_read(src, valid);
  std::memset(dst, 0xff, bytes);
  current->open_copies.push_back({static_cast<char*>(dst), static_cast<const char*>(src), bytes,
                                  valid, current->copies_issued++});
}

void cp_async16(void* dst, const void* src, u32 valid) {
  cp_async(dst, src, 16, valid, "cp.async 16");
}
void cp_async8(void* dst, const void* src, u32 valid) {
  cp_async(dst, src, 8, valid, "cp.async 8");
}
void cp_async4(void* dst, const void* src, u32 valid) {
  cp_async(dst, src, 4, valid, "cp.async 4");
}

void cp_async_commit() {
  Quiet quiet;
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait_pending(u32 pending) {
  Quiet quiet;
  while (current->copy_groups.size() > pending) {
    for (simt::CopyOp& copy : current->copy_groups.front()) {
      if (copy.landed) continue;
      simt::touch_write(copy.dst, copy.bytes);
      if (copy.valid != 0) simt::touch_read(copy.src, copy.valid);
      simt::land_copy(copy);
    }
    current->copy_groups.pop_front();
  }
}

namespace {

struct MatrixAccess {
  char* row;  // null in lanes whose address is not used
  u32 address;
  u32* registers;
  u32 tiles;
  bool transposed;
};

int bank_conflicts(MatrixAccess** lanes, u32 tile) {
  int per_bank[8] = {};
  int worst = 0;
  for (u32 i = 0; i < 8; ++i) {
    bool repeated = false;
    for (u32 j = 0; j < i; ++j)
      repeated |= lanes[8 * tile + j]->address == lanes[8 * tile + i]->address;
    if (!repeated) worst = std::max(worst, ++per_bank[lanes[8 * tile + i]->address / 16 % 8]);
  }
  return worst - 1;
}

// Register j of lane (g, t) holds elements e = 0, 1: (row g, col 2t+e), or (row 2t+e, col g) when transposed.
char* element(MatrixAccess** lanes, u32 lane, u32 tile, u32 half) {
  const u32 pair = 2 * (lane % 4) + half, group = lane / 4;
  return lanes[lane]->transposed ? lanes[8 * tile + pair]->row + 2 * group
                                 : lanes[8 * tile + group]->row + 2 * pair;
}

void load_tiles(void** arguments, unsigned) {
  auto** lanes = reinterpret_cast<MatrixAccess**>(arguments);
  ++simt::counters.ldmatrix;
  for (u32 tile = 0; tile < lanes[0]->tiles; ++tile) {
    simt::counters.ldmatrix_conflicts += static_cast<std::uint64_t>(bank_conflicts(lanes, tile));
    for (u32 lane = 0; lane < 32; ++lane) {
      std::uint16_t halves[2];
      for (u32 e = 0; e < 2; ++e) std::memcpy(&halves[e], element(lanes, lane, tile, e), 2);
      lanes[lane]->registers[tile] = halves[0] | static_cast<u32>(halves[1]) << 16;
    }
  }
}

void store_tiles(void** arguments, unsigned) {
  auto** lanes = reinterpret_cast<MatrixAccess**>(arguments);
  for (u32 tile = 0; tile < lanes[0]->tiles; ++tile) {
    for (u32 lane = 0; lane < 32; ++lane) {
      for (u32 e = 0; e < 2; ++e) {
        const auto half = static_cast<std::uint16_t>(lanes[lane]->registers[tile] >> 16 * e);
        std::memcpy(element(lanes, lane, tile, e), &half, 2);
      }
    }
  }
}

void check_row(const void* row, const char* what, u32* address) {
  *address = simt::shared_address(row, 16);
  if (*address % 16 != 0)
    simt::fail(std::string(what) + ": the row address is not 16-byte aligned");
}

}  // namespace

void ldmatrix(u32* registers, const void* row, u32 tiles, bool transposed, Where where) {
  Quiet quiet;
  MatrixAccess access{nullptr, 0, registers, tiles, transposed};
  char copy[16];
  if (simt::own_lane() < 8 * tiles) {
    check_row(row, "ldmatrix", &access.address);
    simt::touch_read(row, 16);
    std::memcpy(copy, row, 16);  // the lane's own read, at its own time
    access.row = copy;
  }
  simt::collective(~0U, load_tiles, &access, "ldmatrix", where);
}

void stmatrix(void* row, u32* registers, u32 tiles, bool transposed, Where where) {
  Quiet quiet;
  MatrixAccess access{nullptr, 0, registers, tiles, transposed};
  if (simt::own_lane() < 8 * tiles) {
    check_row(row, "stmatrix", &access.address);
    simt::touch_write(row, 16);
    access.row = static_cast<char*>(row);
  }
  simt::collective(~0U, store_tiles, &access, "stmatrix", where);
}

u32 movmatrix_trans(u32 value, Where where) {
  Quiet quiet;
  struct Move {
    u32 in, out;
  } argument{value, 0};
  const auto op = [](void** arguments, unsigned) {
    auto** lanes = reinterpret_cast<Move**>(arguments);
    for (u32 lane = 0; lane < 32; ++lane) {
      const u32 row = 2 * (lane % 4), column = lane / 4;
      u32 out = 0;
      for (u32 e = 0; e < 2; ++e) {
        const u32 source = lanes[4 * (row + e) + column / 2]->in >> 16 * (column % 2);
        out |= (source & 0xffffU) << 16 * e;
      }
      lanes[lane]->out = out;
    }
  };
  simt::collective(~0U, op, &argument, "movmatrix", where);
  return argument.out;
}

namespace {

struct Mma {
  float* d;
  const u32* a;
  u32 b[2];
};

template <bool kHalf>
float unpack(u32 word, u32 e) {
  const auto bits = static_cast<std::uint16_t>(word >> 16 * e);
  return kHalf ? f16_to_float(bits) : bf16_to_float(bits);
}

template <u32 K>
void multiply(Mma** lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  ++simt::counters.mma;
  for (u32 lane = 0; lane < 32; ++lane) {
    for (u32 i = 0; i < 4; ++i) {
      const u32 row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (u32 k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->d[i] += sum;
    }
  }
}

template <bool kHalf>
void mma_16816(void** arguments, unsigned) {
  auto** lanes = reinterpret_cast<Mma**>(arguments);
  float a[16][16], b[16][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const u32 g = lane / 4, t = lane % 4;
    for (u32 e = 0; e < 2; ++e) {
      for (u32 r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + e + 8 * (r / 2)] = unpack<kHalf>(lanes[lane]->a[r], e);
      for (u32 r = 0; r < 2; ++r) b[2 * t + e + 8 * r][g] = unpack<kHalf>(lanes[lane]->b[r], e);
    }
  }
  multiply(lanes, a, b);
}

float tf32(u32 word) {
  word &= 0xffffe000U;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

void mma_1688(void** arguments, unsigned) {
  auto** lanes = reinterpret_cast<Mma**>(arguments);
  float a[16][8], b[8][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const u32 g = lane / 4, t = lane % 4;
    for (u32 r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32(lanes[lane]->a[r]);
    for (u32 r = 0; r < 2; ++r) b[t + 4 * r][g] = tf32(lanes[lane]->b[r]);
  }
  multiply(lanes, a, b);
}

}  // namespace

void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where) {
  Quiet quiet;
  Mma argument{d, a, {b0, b1}};
  simt::collective(~0U, mma_16816<false>, &argument, "mma bf16", where);
}
void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where) {
  Quiet quiet;
  Mma argument{d, a, {b0, b1}};
  simt::collective(~0U, mma_16816<true>, &argument, "mma f16", where);
}
void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where) {
  Quiet quiet;
  Mma argument{d, a, {b0, b1}};
  simt::collective(~0U, mma_1688, &argument, "mma tf32", where);
}

void backoff(Where where) {
  Quiet quiet;
  simt::spin(where);
}

}  // namespace prim
