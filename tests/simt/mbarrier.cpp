// mbarriers: phases, arrivals, transactions.
#include <cstring>

#include "cuda/prim/host.h"
#include "tests/simt/agent.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

namespace simt {

namespace {

constexpr std::int64_t kMost = (1 << 20) - 1;
constexpr std::uint64_t kPattern = 0x6d62617272696572;  // what an mbarrier's memory holds

void settle(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.observed = !barrier.waiting.empty();
  for (Fiber* f : barrier.waiting) make_ready(f);
  barrier.waiting.clear();
}

void add_bytes(Mbarrier& barrier, std::int64_t bytes) {
  barrier.bytes += bytes;
  if (barrier.bytes > kMost || barrier.bytes < -kMost)
    fail("mbarrier: the pending bytes exceed 2^20 - 1");
}

void count_arrival(Mbarrier& barrier) {
  if (!barrier.observed)
    fail("mbarrier: an arrival while nobody has observed the end of the phase before");
  if (barrier.pending == 0) fail("mbarrier: more arrivals than its count");
  --barrier.pending;
}

Mbarrier& own_barrier(prim::u64* bar, const char* what) {
  Mbarrier& barrier = live_barrier(current->block, shared_address(bar, 8), what);
  touch_read(bar, 8);
  return barrier;
}

void arrive(prim::u64* bar, std::uint32_t bytes, const char* what) {
  Quiet quiet;
  Mbarrier& barrier = own_barrier(bar, what);
  add_bytes(barrier, bytes);
  release(&barrier.edge[barrier.phase & 1]);
  count_arrival(barrier);
  settle(barrier);
}

void acquire_phase(Mbarrier& barrier, prim::u32 parity, Scope scope) {
  barrier.observed = true;
  acquire(&barrier.edge[parity]);
  if (scope == Scope::kCluster) acquire(&barrier.remote_edge[parity]);
}

void wait(prim::u64* bar, prim::u32 parity, Scope scope, const Where& where) {
  Quiet quiet;
  Mbarrier& barrier = own_barrier(bar, "mbarrier wait");
  if (parity > 1) fail("mbarrier wait: a parity is 0 or 1");
  if ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(current);
    park("mbarrier wait", where);
    if ((barrier.phase & 1) == parity)
      fail("mbarrier wait: two phases passed before this thread looked");
  }
  acquire_phase(barrier, parity, scope);
}

}  // namespace

Mbarrier& live_barrier(Block* block, std::uint32_t address, const char* what) {
  if (address % 8 != 0) fail(std::string(what) + ": an mbarrier is 8-byte aligned");
  const auto found = block->async.barriers.find(address);
  if (found == block->async.barriers.end())
    fail(std::string(what) + ": the mbarrier is not initialised");
  std::uint64_t memory;
  std::memcpy(&memory, shared_pointer(block, address, 8), 8);
  if (memory != (kPattern ^ address))
    fail(std::string(what) + ": the mbarrier's memory was overwritten");
  return found->second;
}

Mbarrier& shared_barrier(Block* block, std::uint32_t address, const char* what) {
  Mbarrier& barrier = live_barrier(block, address, what);
  if (!barrier.fenced) {
    fail(std::string(what) +
         ": no fence_mbar_init after the init of the mbarrier that others complete");
  }
  return barrier;
}

void complete_bytes(Mbarrier& barrier, std::uint32_t bytes, void* agent, Scope scope) {
  const auto parity = barrier.phase & 1;
  agent_release(agent,
                scope == Scope::kCluster ? &barrier.remote_edge[parity] : &barrier.edge[parity]);
  add_bytes(barrier, -static_cast<std::int64_t>(bytes));
  settle(barrier);
}

void arrive_by_agent(Mbarrier& barrier, void* agent) {
  agent_release(agent, &barrier.edge[barrier.phase & 1]);
  count_arrival(barrier);
  settle(barrier);
}

}  // namespace simt

namespace prim {

using simt::current;
using simt::Mbarrier;
using simt::Quiet;
using simt::Scope;

void mbar_init(u64* bar, u32 count) {
  Quiet quiet;
  const u32 address = simt::shared_address(bar, 8);
  if (address % 8 != 0) simt::fail("mbarrier.init: an mbarrier is 8-byte aligned");
  if (count < 1 || count > simt::kMost) simt::fail("mbarrier.init: the count is 1 to 2^20 - 1");
  auto& barriers = current->block->async.barriers;
  if (barriers.count(address) != 0) simt::fail("mbarrier.init on a live mbarrier");
  simt::touch_write(bar, 8);
  *bar = simt::kPattern ^ address;
  Mbarrier& barrier = barriers[address];
  barrier.count = barrier.pending = count;
  barrier.owner = current;
}

void mbar_inval(u64* bar) {
  Quiet quiet;
  const u32 address = simt::shared_address(bar, 8);
  const Mbarrier& barrier = simt::live_barrier(current->block, address, "mbarrier.inval");
  if (!barrier.waiting.empty()) simt::fail("mbarrier.inval while threads wait");
  if (barrier.bytes != 0) simt::fail("mbarrier.inval while bytes are pending");
  simt::touch_write(bar, 8);
  *bar = ~u64{0};
  current->block->async.barriers.erase(address);
}

void fence_mbar_init() {
  Quiet quiet;
  for (auto& [address, barrier] : current->block->async.barriers)
    if (barrier.owner == current) barrier.fenced = true;
}

void mbar_arrive(u64* bar) { simt::arrive(bar, 0, "mbarrier.arrive"); }
void mbar_arrive_expect_tx(u64* bar, u32 bytes) {
  simt::arrive(bar, bytes, "mbarrier.arrive.expect_tx");
}
void mbar_expect_tx(u64* bar, u32 bytes) {
  Quiet quiet;
  Mbarrier& barrier = simt::own_barrier(bar, "mbarrier.expect_tx");
  simt::add_bytes(barrier, bytes);
  simt::settle(barrier);
}

void mbar_arrive_remote(u64* bar, u32 rank) {
  Quiet quiet;
  const u32 address = simt::shared_address(bar, 8);
  simt::Block* target = &simt::cluster_block(rank);
  Mbarrier& barrier = simt::shared_barrier(target, address, "remote mbarrier.arrive");
  simt::touch_read(simt::shared_pointer(target, address, 8), 8);
  simt::release(&barrier.remote_edge[barrier.phase & 1]);
  simt::count_arrival(barrier);
  simt::settle(barrier);
}

bool mbar_test(u64* bar, u32 parity, Where where) {
  Quiet quiet;
  Mbarrier& barrier = simt::own_barrier(bar, "mbarrier.test_wait");
  if (parity > 1) simt::fail("mbarrier.test_wait: a parity is 0 or 1");
  if ((barrier.phase & 1) == parity) {
    simt::spin(where);
    return false;
  }
  simt::acquire_phase(barrier, parity, Scope::kBlock);
  return true;
}

void mbar_wait(u64* bar, u32 parity, Where where) { simt::wait(bar, parity, Scope::kBlock, where); }
void mbar_wait_cluster(u64* bar, u32 parity, Where where) {
  simt::wait(bar, parity, Scope::kCluster, where);
}

static void arrive_after_copies(u64* bar, bool counted) {
  Quiet quiet;
  Mbarrier& barrier = simt::own_barrier(bar, "cp.async.mbarrier.arrive");
  if (!counted && ++barrier.pending > simt::kMost)
    simt::fail("cp.async.mbarrier.arrive: the pending count exceeds 2^20 - 1");
  simt::Fiber* issuer = current;
  const std::size_t end = issuer->copies_issued;
  issuer->copies_covered = end;
  simt::Block* block = issuer->block;
  const u32 address = simt::shared_address(bar, 8);
  const auto land = [=](void* agent) {
    const auto finish = [&](simt::CopyOp& copy) {
      if (copy.landed || copy.number >= end) return;
      simt::agent_write(agent, copy.dst, copy.bytes);
      if (copy.valid != 0) simt::agent_read(agent, copy.src, copy.valid);
      simt::land_copy(copy);
    };
    for (auto& group : issuer->copy_groups)
      for (simt::CopyOp& copy : group) finish(copy);
    for (simt::CopyOp& copy : issuer->open_copies) finish(copy);
    simt::arrive_by_agent(simt::live_barrier(block, address, "cp.async.mbarrier.arrive"), agent);
  };
  current->gang->flights.push_back({block, simt::create_agent(), land});
}

void cp_async_mbar_arrive(u64* bar) { arrive_after_copies(bar, false); }
void cp_async_mbar_arrive_noinc(u64* bar) { arrive_after_copies(bar, true); }

}  // namespace prim
