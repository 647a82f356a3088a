#pragma once
// How what the units of a head need of each other gets from one time step to the next. Publication k is what enters step k
// (of the kernel's order in time); every warp with units puts its rows of it, then says so; every warp that reads waits for all of it.
// A policy:
//   begin(publications)        all threads, before anything else
//   open(k)                    the whole warp, before its put()s: what it has read is read
//   put(k, row, column, words) 2 kWords neighbouring numbers; a row is one (plane, sequence)
//   done(k)                    the whole warp, after its put()s
//   wait(k, reads) -> buffer   all warps; readable until the warp's next put. Warps without units read nothing; where no
//                              barrier of the block keeps them in step, they must not watch one that others pass
//   end()                      all threads
// Two buffers are enough: whoever puts publication k + 2 has waited for k + 1, and nobody puts that before it has read k.
#include "cuda/slstm/slstm_block.cuh"

namespace xlstm::cuda {

/// What a policy works with.
struct SlstmExchangeSpace {
  prim::u64* barriers;  ///< two, in shared memory
  bf16* buffers;        ///< in shared memory
  u32 numbers;          ///< of a buffer, rows of the padding included
  int rank, blocks;     ///< of the group
  int warps;            ///< of all blocks of the group, that put something
  u32* arrivals;        ///< kGrid: of the group
  bf16* memory;         ///< kGrid: of the group, two buffers
  int rows, columns;    ///< of a buffer, without padding
};

/// `group`: of this launch.
DEVICE_FUNCTION SlstmExchangeSpace slstm_space(const SlstmKernelShape& kernel, const SlstmShape& s,
                                               const SlstmShared& layout, unsigned char* shared,
                                               int group, int rank) {
  const SlstmDivision& d = s.division;
  SlstmExchangeSpace e;
  e.barriers = reinterpret_cast<prim::u64*>(shared + layout.barriers);
  e.buffers = reinterpret_cast<bf16*>(shared + layout.exchange);
  e.numbers = slstm_buffer_numbers(kernel, d);
  e.rank = rank, e.blocks = d.blocks;
  e.warps = d.padded / (kSlstmGroupUnits * kernel.groups);
  e.rows = kernel.planes * kSlstmRows, e.columns = kernel.channels * d.padded;
  e.arrivals = nullptr, e.memory = nullptr;
  if (s.grid.arrivals != nullptr) {
    const int64_t place = d.first_group + group;
    e.arrivals = s.grid.arrivals + place;
    e.memory = s.grid.exchange + place * 2 * e.rows * e.columns;
  }
  return e;
}

/// Within one block.
class BlockExchange {
 public:
  static constexpr int kBuffers = 2, kWords = 1;
  static constexpr bool kWithinBlock = true;

  DEVICE_FUNCTION explicit BlockExchange(const SlstmExchangeSpace& space) : s(space) {}
  DEVICE_FUNCTION void begin(int) {}
  DEVICE_FUNCTION void open(int) {}
  DEVICE_FUNCTION void put(int k, int row, int column, const u32 (&words)[kWords]) {
    *reinterpret_cast<u32*>(s.buffers + (k & 1) * s.numbers + row * (s.columns + 8) + column) =
        words[0];
  }
  DEVICE_FUNCTION void done(int) {}
  DEVICE_FUNCTION const bf16* wait(int k, bool) {
    prim::sync_block();
    return s.buffers + (k & 1) * s.numbers;
  }
  DEVICE_FUNCTION void end() {}

 protected:
  SlstmExchangeSpace s;
};

#if PRIM_HAS_SM90A

/// Through the shared memory of all blocks of a cluster: every put goes to each of them, its bytes complete their
/// barriers.
class ClusterExchange {
 public:
  static constexpr int kBuffers = 2, kWords = 4;
  static constexpr bool kWithinBlock = false;

  DEVICE_FUNCTION explicit ClusterExchange(const SlstmExchangeSpace& space) : s(space) {}
  DEVICE_FUNCTION void begin(int count) {
    publications = count;
    if (prim::thread_idx().x == 0) {
      prim::mbar_init(s.barriers, 1);
      prim::mbar_init(s.barriers + 1, 1);
      prim::fence_mbar_init();
      expect(0);
      expect(1);
    }
    prim::cluster_sync();
  }
  /// Not every lane stores: those that do speak for the reads of all.
  DEVICE_FUNCTION void open(int) { prim::sync_warp(); }
  DEVICE_FUNCTION void put(int k, int row, int column, const u32 (&words)[4]) {
    auto* to =
        reinterpret_cast<u32*>(s.buffers + (k & 1) * s.numbers + row * (s.columns + 8) + column);
    for (int i = 1; i <= s.blocks; ++i) {
      const int other = s.rank + i < s.blocks ? s.rank + i : s.rank + i - s.blocks;
      prim::st_async_x4(to, static_cast<u32>(other), words, s.barriers + (k & 1));
    }
  }
  DEVICE_FUNCTION void done(int) {}
  DEVICE_FUNCTION const bf16* wait(int k, bool reads) {
    if (reads) prim::mbar_wait_cluster(s.barriers + (k & 1), static_cast<u32>(k >> 1 & 1));
    if constexpr (prim::kRacecheck) prim::sync_block();
    if (prim::thread_idx().x == 0) expect(k + 2);
    return s.buffers + (k & 1) * s.numbers;
  }
  DEVICE_FUNCTION void end() { prim::cluster_sync(); }

 protected:
  DEVICE_FUNCTION void expect(int k) {
    if (k < publications)
      prim::mbar_arrive_expect_tx(s.barriers + (k & 1), static_cast<u32>(2 * s.rows * s.columns));
  }
  SlstmExchangeSpace s;
  int publications = 0;
};

#endif

/// Through global memory, between blocks that are resident together. A counter per group only rises.
class GridExchange {
 public:
  static constexpr int kBuffers = 1, kWords = 4;
  static constexpr bool kWithinBlock = false;

  DEVICE_FUNCTION explicit GridExchange(const SlstmExchangeSpace& space) : s(space) {}
  DEVICE_FUNCTION void begin(int) {}
  DEVICE_FUNCTION void open(int) {}
  DEVICE_FUNCTION void put(int k, int row, int column, const u32 (&words)[4]) {
    *reinterpret_cast<Bytes16*>(s.memory + ((k & 1) * s.rows + row) * s.columns +
                                column) = {{words[0], words[1], words[2], words[3]}};
  }
  DEVICE_FUNCTION void done(int) {
    prim::sync_warp();
    if (prim::thread_idx().x % 32 == 0) prim::red_release_add(s.arrivals, 1);
  }
  DEVICE_FUNCTION const bf16* wait(int k, bool) {
    const int wanted = (k + 1) * s.warps;
    if (prim::thread_idx().x == 0)
      while (static_cast<int>(prim::ld_acquire(s.arrivals) - static_cast<u32>(wanted)) < 0)
        prim::backoff();
    prim::sync_block();  // and all warps have read the publication before
    const bf16* from = s.memory + (k & 1) * s.rows * s.columns;
    const int pieces = s.columns / 8;
    for (int i = static_cast<int>(prim::thread_idx().x); i < s.rows * pieces; i += kSlstmThreads) {
      const int row = i / pieces, column = i % pieces * 8;
      prim::cp_async16(s.buffers + row * (s.columns + 8) + column, from + row * s.columns + column);
    }
    prim::cp_async_commit();
    prim::cp_async_wait<0>();
    prim::sync_block();
    return s.buffers;
  }
  DEVICE_FUNCTION void end() {}

 protected:
  SlstmExchangeSpace s;
};

}  // namespace xlstm::cuda
