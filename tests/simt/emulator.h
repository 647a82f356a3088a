#pragma once
// State of the emulator, for its own translation units only.
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/simt/async.h"
#include "tests/simt/runtime.h"

namespace simt {

struct Block;
struct Gang;

struct CopyOp {
  char* dst;
  const char* src;
  unsigned bytes, valid;
  std::size_t number;  // by thread
  bool landed = false;
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  Gang* gang = nullptr;
  Dim3 thread{0, 0, 0};
  unsigned linear = 0;
  bool started = false, done = false;
  const char* what = "";
  Where where;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  std::vector<CopyOp> open_copies;
  std::deque<std::vector<CopyOp>> copy_groups;
  std::size_t copies_issued = 0;
  std::size_t copies_covered = 0;  // of them, those an mbarrier waits for
  std::vector<Store> open_stores;
  std::deque<StoreGroup> store_groups;
  bool cluster_arrived = false;
  unsigned cluster_generation = 0;
};

struct Barrier {
  unsigned arrived = 0, expected = 0, generation = 0;
  char edge[2] =
      {};  // one TSan object per parity: a fast thread's next arrival must not reach slow ones
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

struct Warp {
  Rendezvous meetings[32];
  char edge[32][2] = {};  // of __syncwarp, by the first lane of its mask
  unsigned generation[32] = {};
  TensorCore core;
  unsigned registers = 0, wanted_registers = 0;
  std::vector<unsigned> register_changes;
};

struct Block {
  Dim3 index{0, 0, 0};
  Gang* gang = nullptr;
  unsigned rank = 0, threads = 0, alive = 0;
  char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::uint32_t window = 0;  // address of the first byte of dynamic shared memory
  BlockAsync async;
  std::vector<Warp> warps;
  Barrier barriers[16];
};

struct Gang {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::size_t head = 0, left = 0;
  Barrier cluster_barrier;
  Fiber main;
  void* end_edge = nullptr;  // all work of the launch -> the host after it
  Launch shape;
  std::mt19937_64 random;
  std::string error;
  std::exception_ptr exception;
  std::uint64_t idle_yields = 0;
  std::deque<Flight> flights;
  std::vector<Store> late_stores;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
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

/// Every lane of `mask` deposits its argument; the last one runs `op` for all. Same op and same line required.
void collective(unsigned mask, LaneFunction op, void* argument, const char* what,
                const Where& where);
/// A turn of a spin loop: lets the others run; too many without progress are a livelock.
void spin(const Where& where);
inline Warp& own_warp() { return current->block->warps[current->linear / 32]; }
inline unsigned own_lane() { return current->linear % 32; }

/// Called by an exiting thread: barriers that now wait for nobody.
void barriers_after_exit(Fiber* fiber);

/// Offset of a pointer in the caller's shared memory plus the window's base; fails for any other pointer or overrun.
std::uint32_t shared_address(const void* pointer, std::size_t bytes);
char* shared_pointer(Block* block, std::uint32_t address, std::size_t bytes);
/// The block of that rank in the caller's cluster; fails where its shared memory may not be touched.
Block& cluster_block(unsigned rank);
/// Moves the data of a cp.async, unless that has happened.
void land_copy(CopyOp& copy);
inline constexpr std::uint32_t kWindow =
    1024;  // shared windows do not begin at 0 on hardware either

}  // namespace simt
