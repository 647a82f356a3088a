// wgmma. Every warp computes its own 16 rows when it waits: hardware orders nothing between the four.
#include <algorithm>
#include <cstring>

#include "cuda/prim/host.h"
#include "tests/simt/agent.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

namespace simt {

namespace {

using prim::u32;
using prim::u64;

constexpr u64 kUsedBits = 0xc000'3fff'3fff'3fffULL;
constexpr u64 kBaseOffset = 7ULL << 49;
constexpr const char* kWhat = "wgmma";

struct Descriptor {
  u32 start, leading, stride;
  prim::Swizzle mode;
};

Descriptor decode(u64 bits) {
  const Descriptor d{
      static_cast<u32>(bits & 0x3fff) << 4, static_cast<u32>(bits >> 16 & 0x3fff) << 4,
      static_cast<u32>(bits >> 32 & 0x3fff) << 4, static_cast<prim::Swizzle>(bits >> 62)};
  if ((bits & ~(kUsedBits | kBaseOffset)) != 0) fail("wgmma descriptor: unused bits are set");
  const u32 width = prim::swizzle_bytes(d.mode);
  const bool aligned = d.mode == prim::Swizzle::kNone || d.start / 128 % (width / 16) == 0;
  if ((bits & kBaseOffset) != 0 || !aligned) {
    fail("wgmma descriptor: the swizzle pattern must begin on a multiple of " +
         std::to_string(8 * width) + " bytes, with base offset 0");
  }
  return d;
}

/// Address of the 16-byte chunk that begins with element (mn, k): eight along k, or along mn when transposed.
u32 chunk_address(const Descriptor& d, bool transposed, u32 mn, u32 k) {
  const u32 width = prim::swizzle_bytes(d.mode), columns = width / 2;
  u32 address = d.start;
  if (d.mode == prim::Swizzle::kNone) {
    address += transposed ? mn / 8 * d.stride + k / 8 * d.leading + k % 8 * 16
                          : mn / 8 * d.stride + mn % 8 * 16 + k / 8 * d.leading;
  } else {
    address += transposed ? mn / columns * d.leading + k / 8 * d.stride + k % 8 * width +
                                2 * (mn % columns)
                          : mn / 8 * d.stride + mn % 8 * width + 2 * k;
  }
  return prim::swizzled(address, d.mode);
}

/// Calls `visit(address, mn, k)` for every chunk of an operand's rows [first, first + count).
template <class Visit>
void for_each_chunk(u64 bits, bool transposed, u32 first, u32 count, Visit visit) {
  const Descriptor d = decode(bits);
  const u32 step_mn = transposed ? 8 : 1, step_k = transposed ? 1 : 8;
  for (u32 mn = first; mn < first + count; mn += step_mn)
    for (u32 k = 0; k < 16; k += step_k) visit(chunk_address(d, transposed, mn, k), mn, k);
}

float number(const char* place, bool half) {
  std::uint16_t bits;
  std::memcpy(&bits, place, 2);
  return half ? prim::f16_to_float(bits) : prim::bf16_to_float(bits);
}

using Rows = std::vector<std::array<float, 16>>;

/// `seen`: the next bytes of Product::seen, advanced.
Rows load_operand(Block* block, u64 bits, bool transposed, bool half, u32 first, u32 count,
                  const char*& seen) {
  Rows rows(count);
  const char* view = block->async.view.data();
  for_each_chunk(bits, transposed, first, count, [&](u32 address, u32 mn, u32 k) {
    const char* place = shared_pointer(block, address, 16);
    if (std::memcmp(place, seen, 16) != 0)
      fail("wgmma: an operand in shared memory was overwritten before the wait");
    seen += 16;
    const char* chunk = view + (place - block->shared);
    for (u32 i = 0; i < 8; ++i)
      rows[mn - first + (transposed ? i : 0)][k + (transposed ? 0 : i)] =
          number(chunk + 2 * i, half);
  });
  return rows;
}

Rows register_operand(const HeldRegisters& held, bool half) {
  Rows rows(16);
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 r = 0; r < 4; ++r)
      for (u32 e = 0; e < 2; ++e)
        rows[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + e + 8 * (r / 2)] =
            number(&held.values[16 * lane + 4 * r + 2 * e], half);
  return rows;
}

void multiply(const Product& product, unsigned warp) {
  Block* block = current->block;
  const char* seen = product.seen.data();
  const Rows a = product.a_registers ? register_operand(*product.a_registers, product.half)
                                     : load_operand(block, product.a, product.transposed_a,
                                                    product.half, 16 * (warp % 4), 16, seen);
  const Rows b =
      load_operand(block, product.b, product.transposed_b, product.half, 0, product.n, seen);
  auto* d = reinterpret_cast<float*>(product.d->values.data());
  const u32 registers = product.n / 2;
  for (u32 lane = 0; lane < 32; ++lane) {
    for (u32 v = 0; v < registers; ++v) {
      const auto& row = a[lane / 4 + 8 * (v / 2 % 2)];
      const auto& column = b[8 * (v / 4) + 2 * (lane % 4) + v % 2];
      float sum = product.accumulate ? d[lane * registers + v] : 0.0F;
      for (u32 k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[lane * registers + v] = sum;
    }
  }
}

// Registers in flight ---------------------------------------------------------------------------------------------------

bool untouched(const HeldRegisters& held) {
  for (const char* place : held.place)
    for (std::size_t i = 0; i < held.bytes; ++i)
      if (place[i] != '\xff') return false;
  return true;
}

/// Takes the registers at `place` (by lane) out of the threads' reach, or joins a product that already has.
std::shared_ptr<HeldRegisters> hold(TensorCore& core, const std::array<char*, 32>& place,
                                    std::size_t bytes) {
  for (const auto& held : core.held) {
    const bool apart =
        place[0] + bytes <= held->place[0] || held->place[0] + held->bytes <= place[0];
    if (apart) continue;
    if (held->place != place || held->bytes != bytes)
      fail("wgmma: the registers overlap those of a product of another shape in flight");
    if (!untouched(*held)) fail("wgmma: registers of a product in flight were written");
    ++held->uses;
    return held;
  }
  auto held = std::make_shared<HeldRegisters>();
  held->place = place;
  held->bytes = bytes;
  held->uses = 1;
  for (char* from : place) {
    held->values.insert(held->values.end(), from, from + bytes);
    std::memset(from, 0xff, bytes);
  }
  core.held.push_back(held);
  return held;
}

void release_registers(TensorCore& core, const std::shared_ptr<HeldRegisters>& held) {
  if (!held || --held->uses != 0) return;
  if (!untouched(*held))
    fail("wgmma: registers of a product in flight were written before the wait");
  for (u32 lane = 0; lane < 32; ++lane)
    std::memcpy(held->place[lane], &held->values[lane * held->bytes], held->bytes);
  core.held.erase(std::find(core.held.begin(), core.held.end(), held));
}

// Issue -----------------------------------------------------------------------------------------------------------------

struct Issue {
  float* d;
  const u32* a_registers;
  u64 a, b;
  prim::WgmmaShape shape;
};

/// The four warps of a warpgroup issue the same products.
void compare_warps(const Issue& issue) {
  const unsigned warp = current->linear / 32;
  WarpgroupLog& log = current->block->async.warpgroups[warp / 4];
  const u64 index = own_warp().core.issued++ - log.first;
  if (index == log.entries.size()) log.entries.push_back({issue.a, issue.b, issue.shape.n, 0});
  WarpgroupLog::Entry& entry = log.entries[index];
  if (entry.a != issue.a || entry.b != issue.b || entry.n != issue.shape.n)
    fail("wgmma: the warps of the warpgroup have different descriptors or shapes");
  entry.warps |= 1U << warp % 4;
  while (!log.entries.empty() && log.entries.front().warps == 15) {
    log.entries.pop_front();
    ++log.first;
  }
}

/// The read of shared memory begins: by the tensor core, ordered after the warp, and by the asynchronous proxy.
void read_operand(TensorCore& core, std::vector<char>& seen, u64 bits, bool transposed, u32 first,
                  u32 count) {
  Block* block = current->block;
  char* done = &core.group_edges[core.committed % core.group_edges.size()];
  for_each_chunk(bits, transposed, first, count, [&](u32 address, u32, u32) {
    const char* chunk = shared_pointer(block, address, 16);
    agent_read(core.agent, chunk, 16);
    seen.insert(seen.end(), chunk, chunk + 16);
    async_view(block, address, 16, done);
  });
}

void issue_product(void** arguments, unsigned) {
  auto** lanes = reinterpret_cast<Issue**>(arguments);
  const Issue& issue = *lanes[0];
  TensorCore& core = own_warp().core;
  if (!core.fenced)
    fail("wgmma without a wgmma_fence since the kernel's begin or the last wgmma_wait");
  std::array<char*, 32> d, a;
  for (u32 lane = 0; lane < 32; ++lane) {
    if (lanes[lane]->a != issue.a || lanes[lane]->b != issue.b)
      fail("wgmma: the lanes have different descriptors");
    d[lane] = reinterpret_cast<char*>(lanes[lane]->d);
    a[lane] = reinterpret_cast<char*>(const_cast<u32*>(lanes[lane]->a_registers));
  }
  compare_warps(issue);
  const prim::WgmmaShape& shape = issue.shape;
  Product product{shape.n,
                  shape.half,
                  shape.transposed_a,
                  shape.transposed_b,
                  shape.accumulate,
                  issue.a,
                  issue.b,
                  nullptr,
                  nullptr,
                  {}};
  if (core.agent == nullptr) core.agent = create_agent();
  agent_acquire(core.agent, &core.issue_edge);
  if (!shape.registers_a)
    read_operand(core, product.seen, issue.a, shape.transposed_a, 16 * (current->linear / 32 % 4),
                 16);
  read_operand(core, product.seen, issue.b, shape.transposed_b, 0, shape.n);
  if (shape.registers_a) product.a_registers = hold(core, a, 16);
  product.d = hold(core, d, 2 * shape.n);
  core.open.push_back(std::move(product));
  ++counters.wgmma;
}

struct Wait {
  u32 pending;
  u64 first, end;  // groups that completed
};

void complete_groups(void** arguments, unsigned) {
  auto** lanes = reinterpret_cast<Wait**>(arguments);
  TensorCore& core = own_warp().core;
  Wait wait = *lanes[0];
  wait.end = wait.first = core.committed - core.groups.size();
  for (; core.groups.size() > wait.pending; ++wait.end) {
    for (const Product& product : core.groups.front()) {
      multiply(product, current->linear / 32);
      release_registers(core, product.d);
      release_registers(core, product.a_registers);
    }
    core.groups.pop_front();
  }
  core.fenced = false;
  for (u32 lane = 0; lane < 32; ++lane) *lanes[lane] = wait;
}

void check_warpgroup(const char* what) {
  const unsigned first = current->linear / 128 * 128;
  if (first + 128 > current->block->threads)
    fail(std::string(what) + ": the block has no four warps here");
}

}  // namespace

void tensor_cores_after_exit(Fiber* fiber) {
  Block* block = fiber->block;
  const TensorCore& core = block->warps[fiber->linear / 32].core;
  if (!core.open.empty()) fail("thread exits with wgmma never committed");
  for (const auto& group : core.groups)
    if (!group.empty()) fail("thread exits with wgmma never waited for");
  if (block->alive != 0) return;
  for (const auto& [index, log] : block->async.warpgroups)
    if (!log.entries.empty()) fail("wgmma: not all four warps of a warpgroup issued a product");
}

}  // namespace simt

namespace prim {

using simt::current;
using simt::Quiet;

void wgmma(float* d, const u32* a_registers, u64 a, u64 b, WgmmaShape shape, const Where& where) {
  Quiet quiet;
  simt::check_warpgroup(simt::kWhat);
  simt::Issue issue{d, a_registers, a, b, shape};
  simt::release(&simt::own_warp().core.issue_edge);
  simt::collective(~0U, simt::issue_product, &issue, simt::kWhat, where);
}

void wgmma_fence(Where where) {
  Quiet quiet;
  simt::check_warpgroup("wgmma.fence");
  const auto op = [](void**, unsigned) { simt::own_warp().core.fenced = true; };
  simt::collective(~0U, op, nullptr, "wgmma.fence", where);
}

void wgmma_commit(Where where) {
  Quiet quiet;
  simt::check_warpgroup("wgmma.commit_group");
  const auto op = [](void**, unsigned) {
    simt::TensorCore& core = simt::own_warp().core;
    if (core.groups.size() >= core.group_edges.size()) simt::fail("wgmma: too many groups pending");
    if (core.agent != nullptr)
      simt::agent_release(core.agent, &core.group_edges[core.committed % core.group_edges.size()]);
    ++core.committed;
    core.groups.push_back(std::move(core.open));
    core.open.clear();
  };
  simt::collective(~0U, op, nullptr, "wgmma.commit_group", where);
}

void wgmma_wait_pending(u32 pending, const Where& where) {
  Quiet quiet;
  simt::check_warpgroup("wgmma.wait_group");
  simt::Wait wait{pending, 0, 0};
  simt::collective(~0U, simt::complete_groups, &wait, "wgmma.wait_group", where);
  auto& edges = simt::own_warp().core.group_edges;
  for (u64 group = wait.first; group < wait.end; ++group)
    simt::acquire(&edges[group % edges.size()]);
}

}  // namespace prim
