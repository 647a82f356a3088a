// The register pool of a block (setmaxnreg), and the election of a lane.
#include "cuda/prim/host.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

namespace simt {

namespace {

struct Change {
  unsigned registers;
  bool up;
};

/// The warps of a warpgroup make the same changes.
void compare_warps(const Change& change) {
  Warp* warps = current->block->warps.data() + current->linear / 128 * 4;
  auto& own = own_warp().register_changes;
  own.push_back(change.registers);
  for (unsigned w = 0; w < 4; ++w) {
    const auto& other = warps[w].register_changes;
    if (other.size() >= own.size() && other[own.size() - 1] != change.registers)
      fail("setmaxnreg: the warps of the warpgroup ask for different counts");
  }
}

bool grant(Block* block, Warp& warp) {
  const std::int64_t more = 32 * (std::int64_t{warp.wanted_registers} - warp.registers);
  if (more > block->async.free_registers) return false;
  block->async.free_registers -= more;
  warp.registers = warp.wanted_registers;
  return true;
}

void change(void** arguments, unsigned) {
  const Change& wanted = **reinterpret_cast<Change**>(arguments);
  Block* block = current->block;
  Warp& warp = own_warp();
  compare_warps(wanted);
  if (wanted.up != (wanted.registers >= warp.registers) && wanted.registers != warp.registers) {
    fail(std::string("setmaxnreg.") + (wanted.up ? "inc" : "dec") + " from " +
         std::to_string(warp.registers) + " to " + std::to_string(wanted.registers));
  }
  warp.wanted_registers = wanted.registers;
  if (wanted.up) return;
  grant(block, warp);
  for (Fiber* f : block->async.waiting_for_registers) make_ready(f);
  block->async.waiting_for_registers.clear();
}

}  // namespace

}  // namespace simt

namespace prim {

using simt::current;
using simt::Quiet;

void change_max_registers(u32 registers, bool up, const Where& where) {
  Quiet quiet;
  simt::Block* block = current->block;
  const u32 at_launch = current->gang->shape.registers_per_thread;
  if (current->linear / 128 * 128 + 128 > block->threads)
    simt::fail("setmaxnreg: the block has no four warps here");
  if (at_launch % 8 != 0 || at_launch * block->threads > 65536)
    simt::fail("setmaxnreg: the launch has more registers than the multiprocessor");
  simt::Change wanted{registers, up};
  simt::collective(~0U, simt::change, &wanted, up ? "setmaxnreg.inc" : "setmaxnreg.dec", where);
  simt::Warp& warp = simt::own_warp();
  while (warp.registers != warp.wanted_registers && !simt::grant(block, warp)) {
    block->async.waiting_for_registers.push_back(current);
    simt::park(up ? "setmaxnreg.inc" : "setmaxnreg.dec", where);
  }
}

bool elect_one(Where where) {
  Quiet quiet;
  const auto op = [](void**, unsigned) {};
  simt::collective(~0U, op, nullptr, "elect", where);
  return simt::own_lane() == 0;
}

}  // namespace prim
