// Barriers and warp collectives: the last thread to arrive does the work of all.
#include <bit>

#include "cuda/prim/host.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

namespace simt {

static void complete(Barrier& barrier) {
  barrier.arrived = barrier.expected = 0;
  ++barrier.generation;
  for (Fiber* f : barrier.waiting) make_ready(f);
  barrier.waiting.clear();
}

// Arrives; returns the generation's parity. `wait`: suspends until the barrier completes.
static unsigned meet(Barrier& barrier, unsigned expected, bool wait, const char* what,
                     const Where& where) {
  const unsigned parity = barrier.generation & 1;
  release(&barrier.edge[parity]);
  if (++barrier.arrived >= expected) {
    complete(barrier);
  } else if (wait) {
    barrier.waiting.push_back(current);
    park(what, where);
  }
  if (wait) acquire(&barrier.edge[parity]);
  return parity;
}

void barriers_after_exit(Fiber* fiber) {
  Barrier& block = fiber->block->barriers[0];
  if (block.arrived != 0) {
    fail("thread exits while others of its block wait in __syncthreads at " +
         describe(block.where));
  }
  // barrier.cluster counts the threads that have not exited.
  Barrier& cluster = fiber->gang->cluster_barrier;
  if (cluster.arrived != 0 && cluster.arrived >= fiber->gang->left) complete(cluster);
}

Block& cluster_block(unsigned rank) {
  Gang* gang = current->gang;
  if (rank >= gang->blocks.size()) fail("mapa: the rank is outside the cluster");
  Block& target = gang->blocks[rank];
  if (target.alive == 0) fail("access to the shared memory of a block that has exited");
  if (gang->cluster_barrier.generation == 0 && &target != current->block)
    fail("access to another block's shared memory before the first cluster barrier");
  return target;
}

static Rendezvous& find_meeting(Warp& warp, unsigned mask) {
  Rendezvous* free = nullptr;
  for (Rendezvous& r : warp.meetings) {
    if (r.arrived != 0 && (r.mask & mask) != 0) return r;
    if (r.arrived == 0 && free == nullptr) free = &r;
  }
  free->mask = 0;
  return *free;
}

void collective(unsigned mask, LaneFunction op, void* argument, const char* what,
                const Where& where) {
  const unsigned lane = own_lane();
  if ((mask >> lane & 1) == 0) fail(std::string(what) + ": the calling lane is not in its mask");
  Rendezvous& r = find_meeting(own_warp(), mask);
  if (r.arrived == 0) {
    r.mask = mask;
    r.op = op;
    r.where = where;
  } else if (r.mask != mask || r.op != op || !same_place(r.where, where)) {
    fail(std::string("divergent warp collective: ") + what + " at " + describe(where) +
         " while others wait at " + describe(r.where));
  }
  r.arguments[lane] = argument;
  r.lanes[lane] = current;
  r.arrived |= 1U << lane;
  if (r.arrived != mask) {
    park(what, where);
    return;
  }
  r.op(r.arguments, mask);
  r.arrived = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) != 0 && l != lane) make_ready(r.lanes[l]);
  }
}

}  // namespace simt

namespace prim {

using simt::current;
using simt::Quiet;

Dim3 thread_idx() { return current->thread; }
Dim3 block_idx() { return current->block->index; }
Dim3 block_dim() { return current->gang->shape.block; }
Dim3 grid_dim() { return current->gang->shape.grid; }
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(current->block->shared); }

void sync_block(Where where) {
  Quiet quiet;
  // Hardware would go on without the exited threads; no kernel here means that.
  if (current->block->alive != current->block->threads) {
    simt::fail("__syncthreads after a thread of the block has exited, at " + simt::describe(where));
  }
  simt::Barrier& barrier = current->block->barriers[0];
  if (barrier.arrived == 0) {
    barrier.where = where;
  } else if (!simt::same_place(barrier.where, where)) {
    simt::fail("divergent barrier: __syncthreads at " + simt::describe(where) +
               " while others wait at " + simt::describe(barrier.where));
  }
  simt::meet(barrier, current->block->alive, true, "__syncthreads", where);
}

static void named(u32 id, u32 threads, bool wait, const char* what, const Where& where) {
  Quiet quiet;
  if (id < 1 || id > 15) simt::fail(std::string(what) + ": barrier ids are 1 to 15");
  if (threads == 0 || threads % 32 != 0)
    simt::fail(std::string(what) + ": the count is a multiple of 32");
  simt::Barrier& barrier = current->block->barriers[id];
  if (barrier.arrived != 0 && barrier.expected != threads) {
    simt::fail(std::string(what) + ": two counts on one barrier, at " + simt::describe(where));
  }
  barrier.expected = threads;
  simt::meet(barrier, threads, wait, what, where);
}

void named_sync(u32 id, u32 threads, Where where) { named(id, threads, true, "bar.sync", where); }
void named_arrive(u32 id, u32 threads, Where where) {
  named(id, threads, false, "bar.arrive", where);
}

void sync_warp(u32 mask, Where where) {
  Quiet quiet;
  simt::Warp& warp = simt::own_warp();
  const auto first = static_cast<unsigned>(std::countr_zero(mask)) % 32;
  const unsigned parity = warp.generation[first] & 1;
  const auto op = [](void**, unsigned active) {
    ++simt::own_warp().generation[std::countr_zero(active)];
  };
  simt::release(&warp.edge[first][parity]);
  simt::collective(mask, op, nullptr, "__syncwarp", where);
  simt::acquire(&warp.edge[first][parity]);
}

namespace {

struct Shuffle {
  u32 in, out, source;
};

u32 shuffle(u32 value, u32 source, u32 mask, const char* what, const Where& where) {
  Quiet quiet;
  Shuffle argument{value, value, source};
  const auto op = [](void** lanes, unsigned active) {
    for (unsigned l = 0; l < 32; ++l) {
      if ((active >> l & 1) == 0) continue;
      auto* own = static_cast<Shuffle*>(lanes[l]);
      if ((active >> own->source & 1) == 0) simt::fail("shfl: the source lane is not in the mask");
      own->out = static_cast<Shuffle*>(lanes[own->source])->in;
    }
  };
  simt::collective(mask, op, &argument, what, where);
  return argument.out;
}

}  // namespace

u32 shfl(u32 value, u32 lane, u32 mask, Where where) {
  return shuffle(value, lane & 31, mask, "shfl.idx", where);
}
u32 shfl_xor(u32 value, u32 lanes, u32 mask, Where where) {
  return shuffle(value, (simt::own_lane() ^ lanes) & 31, mask, "shfl.bfly", where);
}
u32 shfl_up(u32 value, u32 delta, u32 mask, Where where) {
  const u32 lane = simt::own_lane();
  return shuffle(value, lane >= delta ? lane - delta : lane, mask, "shfl.up", where);
}
u32 shfl_down(u32 value, u32 delta, u32 mask, Where where) {
  const u32 lane = simt::own_lane();
  return shuffle(value, lane + delta < 32 ? lane + delta : lane, mask, "shfl.down", where);
}

u32 ballot(bool vote, u32 mask, Where where) {
  Quiet quiet;
  Shuffle argument{vote, 0, 0};
  const auto op = [](void** lanes, unsigned active) {
    u32 bits = 0;
    for (unsigned l = 0; l < 32; ++l) {
      if ((active >> l & 1) != 0 && static_cast<Shuffle*>(lanes[l])->in != 0) bits |= 1U << l;
    }
    for (unsigned l = 0; l < 32; ++l) {
      if ((active >> l & 1) != 0) static_cast<Shuffle*>(lanes[l])->out = bits;
    }
  };
  simt::collective(mask, op, &argument, "ballot", where);
  return argument.out;
}

// Clusters ------------------------------------------------------------------------------------------------------------

u32 cluster_rank() { return current->block->rank; }
u32 cluster_size() { return static_cast<u32>(current->gang->blocks.size()); }

void cluster_arrive(Where where) {
  Quiet quiet;
  if (current->cluster_arrived)
    simt::fail("barrier.cluster.arrive twice in one phase, at " + simt::describe(where));
  simt::Barrier& barrier = current->gang->cluster_barrier;
  current->cluster_arrived = true;
  current->cluster_generation = barrier.generation;
  simt::meet(barrier, static_cast<unsigned>(current->gang->left), false, "barrier.cluster.arrive",
             where);
}

void cluster_wait(Where where) {
  Quiet quiet;
  if (!current->cluster_arrived)
    simt::fail("barrier.cluster.wait without arrive, at " + simt::describe(where));
  simt::Barrier& barrier = current->gang->cluster_barrier;
  if (barrier.generation == current->cluster_generation) {
    barrier.waiting.push_back(current);
    simt::park("barrier.cluster.wait", where);
  }
  simt::acquire(&barrier.edge[current->cluster_generation & 1]);
  current->cluster_arrived = false;
}

void* remote_pointer(void* own, u32 rank, std::size_t bytes) {
  Quiet quiet;
  const u32 address = simt::shared_address(own, bytes);
  return simt::shared_pointer(&simt::cluster_block(rank), address, bytes);
}

}  // namespace prim
