#pragma once
// State of the emulator, for its own translation units only.
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/simt/runtime.h"

namespace simt {

struct Block;
struct Gang;

struct CopyOp {
  char* dst;
  const char* src;
  unsigned bytes, valid;
};

using Async = std::function<void()>;

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  Gang* gang = nullptr;
  Dim3 thread{0, 0, 0};
  unsigned linear = 0;
  bool done = false;
  const char* what = "";
  Where where;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  const std::function<bool()>* predicate = nullptr;
  std::vector<CopyOp> open_copies;
  std::deque<std::vector<CopyOp>> copy_groups;
  std::vector<Async> open_stores;
  std::deque<std::vector<Async>> store_groups;
  bool cluster_arrived = false;
  unsigned cluster_generation = 0;
};

struct Barrier {
  unsigned arrived = 0, expected = 0, generation = 0;
  char edge[2] = {};  // one TSan object per parity: a fast thread's next arrival must not reach slow ones
  std::vector<Fiber*> waiting;
  Where where;
};

using LaneFunction = void (*)(void** arguments, unsigned mask);

struct Rendezvous {
  unsigned mask = 0, arrived = 0;
  LaneFunction op = nullptr;
  void* arguments[32] = {};
  Fiber* lanes[32] = {};
  Where where;
};

struct WgmmaOp {
  std::vector<float*> accumulators;   // per lane
  std::vector<float> saved;           // lanes x registers, values at issue
  std::vector<std::uint32_t> a_saved; // lanes x 4, A from registers
  std::vector<std::uint32_t*> a_registers;
  std::uint64_t a_descriptor = 0, b_descriptor = 0;
  unsigned n = 0, warp = 0;
  bool a_transposed = false, b_transposed = false, half = false, keep = true, chained = false;
};

struct Warp {
  Rendezvous meetings[32];
  char edge[2] = {};
  unsigned generation = 0;
  unsigned registers = 0;
  bool fenced = false;
  std::vector<WgmmaOp> open;
  std::deque<std::vector<WgmmaOp>> groups;
};

struct MBarrier {
  std::uint32_t count = 0, pending = 0, phase = 0;
  std::int64_t tx = 0;
  std::uint32_t offset = 0;
  bool seen = true;  // phase completion observed by a wait
  char edge[2] = {};
};

struct Block {
  Dim3 index{0, 0, 0};
  Gang* gang = nullptr;
  unsigned rank = 0, threads = 0, alive = 0;
  char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<std::unique_ptr<MBarrier>> mbarriers;
  unsigned free_registers = 0;
  char proxy_edge = 0;
  void* tsan_proxy = nullptr;
};

struct Gang {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready, pollers;
  std::size_t head = 0, left = 0;
  std::vector<Async> async;
  Barrier cluster_barrier;
  Fiber main;
  Launch shape;
  std::mt19937_64 random;
  std::string error;
  std::uint64_t idle_yields = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  void* tsan_async = nullptr;
};

extern Counters counters;
extern Fiber* current;

/// Ends the launch with an Error that names the calling thread.
[[noreturn]] void fail(const std::string& message);
std::string describe(const Where& where);
bool same_place(const Where& a, const Where& b);
void make_ready(Fiber* fiber);
/// Suspends the calling thread until make_ready.
void park(const char* what, const Where& where);
void park_until(const std::function<bool()>& predicate, const char* what, const Where& where);

/// Every lane of `mask` deposits its argument; the last one runs `op` for all. Same op and same line required.
void collective(unsigned mask, LaneFunction op, void* argument, const char* what, const Where& where);
inline Warp& own_warp() { return current->block->warps[current->linear / 32]; }
inline unsigned own_lane() { return current->linear % 32; }

/// Called by an exiting thread: barriers that now wait for nobody.
void barriers_after_exit(Fiber* fiber);

/// Offset of a pointer in the caller's shared memory plus the window's base; fails for any other pointer or overrun.
std::uint32_t shared_address(const void* pointer, std::size_t bytes);
char* shared_pointer(Block* block, std::uint32_t address, std::size_t bytes);
inline constexpr std::uint32_t kWindow = 1024;  // shared windows do not begin at 0 on hardware either

void check_mbarriers_overlap(const void* pointer, std::size_t bytes);

}  // namespace simt
