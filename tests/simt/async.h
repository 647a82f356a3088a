#pragma once
// State of what works besides the threads: mbarriers, the copy engine, the tensor cores. Asynchronous work is as late
// as it may be: a copy lands when no thread can go on, a product when it is waited for; until then NaN is in its place.
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "cuda/prim/tensor_map.h"

namespace simt {

struct Block;
struct Fiber;
struct Gang;

struct Mbarrier {
  std::uint32_t count = 0, pending = 0;
  std::int64_t bytes = 0;
  std::uint64_t phase = 0;
  bool observed = true;  // some thread saw the end of the phase before this one
  bool fenced = false;   // fence.mbarrier_init came after the init
  const Fiber* owner = nullptr;
  char edge[2] = {}, remote_edge[2] = {};  // by parity; the second for arrivals from other blocks
  std::vector<Fiber*> waiting;
};

/// The barrier at that address of the block's shared window; fails when there is none.
Mbarrier& live_barrier(Block* block, std::uint32_t address, const char* what);
/// The same, and the copy engine or another block is about to use it.
Mbarrier& shared_barrier(Block* block, std::uint32_t address, const char* what);
enum class Scope { kBlock, kCluster };
/// `agent` has moved that many bytes.
void complete_bytes(Mbarrier& barrier, std::uint32_t bytes, void* agent, Scope scope);
void arrive_by_agent(Mbarrier& barrier, void* agent);

/// Work of the copy engine under way.
struct Flight {
  Block* target;
  void* agent;
  std::function<void(void* agent)> land;
};

using Coordinates = std::array<int, 5>;

/// A store from shared to global memory; `seen` is what the source held at the issue.
struct Store {
  prim::EmulatedTensorMap map;
  Coordinates at;
  char* source;
  std::vector<char> seen, data;
  void* reader;
  void* writer;
  std::shared_ptr<char> proxy_edge;
};
struct StoreGroup {
  std::vector<Store> stores;
  bool read = false;
};

/// Registers of a product in flight, by lane; they hold NaN meanwhile.
struct HeldRegisters {
  std::array<char*, 32> place{};
  std::size_t bytes = 0;
  std::vector<char> values;
  unsigned uses = 0;
};
struct Product {
  std::uint32_t n;
  bool half, transposed_a, transposed_b, accumulate;
  std::uint64_t a, b;
  std::shared_ptr<HeldRegisters> d, a_registers;
  std::vector<char> seen;  // the operands in shared memory at the issue
};
/// One warp's share of the tensor core.
struct TensorCore {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::vector<std::shared_ptr<HeldRegisters>> held;
  void* agent = nullptr;
  char issue_edge = 0;
  std::array<char, 64> group_edges{};
  std::uint64_t committed = 0, issued = 0;
};
/// The products of a warpgroup, to compare its warps.
struct WarpgroupLog {
  struct Entry {
    std::uint64_t a, b;
    std::uint32_t n;
    unsigned warps;
  };
  std::deque<Entry> entries;
  std::uint64_t first = 0;
};

struct BlockAsync {
  std::map<std::uint32_t, Mbarrier> barriers;
  // What the copy engine and wgmma see of shared memory: generic writes reach it by fence.proxy.async alone.
  std::vector<char> view;
  bool fence_seen = false;
  void* proxy = nullptr;  // an agent that knows what the fences published
  char proxy_edge = 0;
  std::map<unsigned, WarpgroupLog> warpgroups;
  std::int64_t free_registers = 0;
  std::vector<Fiber*> waiting_for_registers;
};

/// Shared memory as the asynchronous proxy sees it, for a read by `proxy` that is ordered before `done_edge`.
const char* async_view(Block* block, std::uint32_t address, std::size_t bytes, void* done_edge);
/// A write by the copy engine.
void async_write(Block* block, std::uint32_t address, const char* from, std::size_t bytes);

/// Lets one flight land; false when there is none.
bool land_one(Gang* gang);
/// Checks of a thread that ends, of its warp and its block.
void async_after_exit(Fiber* fiber);
void tensor_cores_after_exit(Fiber* fiber);
/// Stores whose group was read, but not waited for, are written by the end of the kernel.
void finish_stores(Gang& gang);
/// Ends what is still under way after an error.
void drop_async(Gang& gang);

}  // namespace simt
