// The copy engine: tensor and bulk copies, asynchronous remote stores, and what it sees of shared memory.
#include <algorithm>
#include <cstring>

#include "cuda/prim/host.h"
#include "tests/simt/agent.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

namespace simt {

using prim::EmulatedTensorMap;

namespace {

EmulatedTensorMap read_map(const prim::TensorMap& map, unsigned rank, const char* what) {
  EmulatedTensorMap description;
  std::memcpy(&description, &map, sizeof description);
  if (description.magic != EmulatedTensorMap::kMagic)
    fail(std::string(what) + ": not a tensor map (make_tensor_map was not called)");
  if (reinterpret_cast<std::uintptr_t>(&map) % 64 != 0)
    fail(std::string(what) + ": the tensor map is not 64-byte aligned");
  if (description.rank != rank)
    fail(std::string(what) + ": the tensor map has rank " + std::to_string(description.rank));
  return description;
}

std::uint32_t row_bytes(const EmulatedTensorMap& map) { return map.box[0] * map.element_bytes; }
std::uint32_t box_bytes(const EmulatedTensorMap& map) {
  std::uint32_t bytes = row_bytes(map);
  for (unsigned i = 1; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

/// One contiguous row of a box: `row` counts them in the order of shared memory; `bytes` of it lie inside the tensor,
/// from `offset` on.
struct Row {
  char* global = nullptr;
  std::uint32_t offset = 0, bytes = 0;
};
Row locate(const EmulatedTensorMap& map, const Coordinates& at, std::uint32_t row) {
  char* place = map.base;
  for (unsigned i = 1; i < map.rank; ++i) {
    const std::int64_t index = std::int64_t{at[i]} + row % map.box[i];
    row /= map.box[i];
    if (index < 0 || index > map.last[i]) return {};
    place += index * static_cast<std::int64_t>(map.strides[i - 1]);
  }
  const std::int64_t first = std::max<std::int64_t>(at[0], 0);
  const std::int64_t end =
      std::min<std::int64_t>(std::int64_t{at[0]} + map.box[0], std::int64_t{map.last[0]} + 1);
  if (first >= end) return {};
  return {place + first * map.element_bytes,
          static_cast<std::uint32_t>(first - at[0]) * map.element_bytes,
          static_cast<std::uint32_t>(end - first) * map.element_bytes};
}

template <class Function>
void for_each_row(const EmulatedTensorMap& map, const Coordinates& at, Function function) {
  const std::uint32_t rows = box_bytes(map) / row_bytes(map);
  for (std::uint32_t row = 0; row < rows; ++row) function(row, locate(map, at, row));
}

/// The swizzle moves whole 16-byte chunks.
std::uint32_t chunk_address(const EmulatedTensorMap& map, std::uint32_t tile,
                            std::uint32_t offset) {
  return prim::swizzled(tile + offset, static_cast<prim::Swizzle>(map.swizzle));
}

Coordinates coordinates(const int* c, unsigned rank) {
  Coordinates at{};
  std::copy(c, c + rank, at.begin());
  return at;
}

/// Starts a copy of `bytes` into the target's shared memory: NaN until `land`.
void start_flight(Block* target, std::uint32_t address, std::size_t bytes,
                  std::function<void(void*)> land) {
  char* place = shared_pointer(target, address, bytes);
  void* agent = create_agent();
  agent_write(agent, place, bytes);
  std::memset(place, 0xff, bytes);
  if (!target->async.view.empty()) async_write(target, address, place, bytes);
  current->gang->flights.push_back({target, agent, std::move(land)});
}

void finish_copy(Block* target, std::uint32_t address, std::size_t bytes, std::uint32_t bar,
                 void* agent, const char* what) {
  agent_write(agent, shared_pointer(target, address, bytes), bytes);
  agent_release(agent, &target->async.proxy_edge);
  complete_bytes(shared_barrier(target, bar, what), static_cast<std::uint32_t>(bytes), agent,
                 Scope::kBlock);
}

void load_box(const EmulatedTensorMap& map, Coordinates at, Block* target, std::uint32_t tile,
              std::uint32_t bar) {
  shared_barrier(target, bar, "tensor copy");
  touch_read(shared_pointer(target, bar, 8), 8);
  const std::uint32_t bytes = box_bytes(map);
  start_flight(target, tile, bytes, [=](void* agent) {
    const std::uint32_t pitch = row_bytes(map);
    std::vector<char> buffer(pitch);
    for_each_row(map, at, [&](std::uint32_t row, const Row& source) {
      std::fill(buffer.begin(), buffer.end(), 0);
      if (source.bytes != 0) {
        agent_read(agent, source.global, source.bytes);
        std::memcpy(buffer.data() + source.offset, source.global, source.bytes);
      }
      for (std::uint32_t offset = 0; offset < pitch; offset += 16)
        async_write(target, chunk_address(map, tile, row * pitch + offset), &buffer[offset], 16);
    });
    finish_copy(target, tile, bytes, bar, agent, "tensor copy");
  });
}

// Stores ---------------------------------------------------------------------------------------------------------------

void read_source(Store& store) {
  if (std::memcmp(store.source, store.seen.data(), store.seen.size()) != 0)
    fail("the source of a tensor store was overwritten before tma_store_wait_read");
  join_agent(store.reader);
  store.reader = nullptr;
  acquire(store.proxy_edge.get());
}

void write_target(const Store& store) {
  const std::uint32_t pitch = row_bytes(store.map);
  for_each_row(store.map, store.at, [&](std::uint32_t row, const Row& target) {
    if (target.bytes == 0) return;
    agent_write(store.writer, target.global, target.bytes);
    std::memcpy(target.global, &store.data[row * pitch + target.offset], target.bytes);
  });
}

void read_group(StoreGroup& group) {
  if (group.read) return;
  for (Store& store : group.stores) read_source(store);
  group.read = true;
}

}  // namespace

void async_write(Block* block, std::uint32_t address, const char* from, std::size_t bytes) {
  char* place = shared_pointer(block, address, bytes);
  if (place != from) std::memcpy(place, from, bytes);
  auto& view = block->async.view;
  if (view.empty()) view.assign(block->shared_bytes, '\xff');
  std::memcpy(&view[static_cast<std::size_t>(place - block->shared)], from, bytes);
}

const char* async_view(Block* block, std::uint32_t address, std::size_t bytes, void* done_edge) {
  const char* place = shared_pointer(block, address, bytes);
  BlockAsync& async = block->async;
  if (async.view.empty()) async.view.assign(block->shared_bytes, '\xff');
  if (async.fence_seen) std::memcpy(async.view.data(), block->shared, block->shared_bytes);
  async.fence_seen = false;
  agent_acquire(async.proxy, &async.proxy_edge);
  agent_read(async.proxy, place, bytes);
  agent_release(async.proxy, done_edge);
  return &async.view[static_cast<std::size_t>(place - block->shared)];
}

bool land_one(Gang* gang) {
  if (gang->flights.empty()) return false;
  const std::size_t i =
      gang->shape.seed == 0 ? 0 : static_cast<std::size_t>(gang->random() % gang->flights.size());
  const Flight& flight = gang->flights[i];
  gang->idle_yields = 0;
  if (flight.target->alive == 0)
    fail("a copy lands in the shared memory of a block that has exited");
  flight.land(flight.agent);
  agent_release(flight.agent, gang->end_edge);
  destroy_agent(flight.agent);
  if (gang->shape.seed != 0)
    std::swap(gang->flights[0], gang->flights[i]);  // their order says nothing
  gang->flights.pop_front();
  return true;
}

void async_after_exit(Fiber* fiber) {
  if (!fiber->open_stores.empty()) fail("thread exits with tensor stores never committed");
  for (StoreGroup& group : fiber->store_groups) {
    if (!group.read && !group.stores.empty())
      fail("thread exits with tensor stores whose source may still be read");
  }
  for (StoreGroup& group : fiber->store_groups)
    for (Store& store : group.stores) fiber->gang->late_stores.push_back(std::move(store));
  fiber->store_groups.clear();
  tensor_cores_after_exit(fiber);
  Block* block = fiber->block;
  if (block->alive != 0) return;
  for (const Flight& flight : fiber->gang->flights)
    if (flight.target == block) fail("block exits while copies into it are under way");
  for (const auto& [address, barrier] : block->async.barriers)
    if (barrier.bytes != 0) fail("block exits while an mbarrier still counts bytes");
}

void finish_stores(Gang& gang) {
  for (Store& store : gang.late_stores) {
    write_target(store);
    agent_release(store.writer, gang.end_edge);
    destroy_agent(store.writer);
  }
  gang.late_stores.clear();
}

static void drop_agent(void* agent, void* end_edge) {
  if (agent == nullptr) return;
  agent_release(agent, end_edge);
  destroy_agent(agent);
}

static void drop_stores(const std::vector<Store>& stores, void* end_edge) {
  for (const Store& store : stores) {
    drop_agent(store.reader, end_edge);
    drop_agent(store.writer, end_edge);
  }
}

void drop_async(Gang& gang) {
  void* end_edge = gang.end_edge;
  for (const Flight& flight : gang.flights) drop_agent(flight.agent, end_edge);
  drop_stores(gang.late_stores, end_edge);
  for (const auto& fiber : gang.fibers) {
    drop_stores(fiber->open_stores, end_edge);
    for (const StoreGroup& group : fiber->store_groups) drop_stores(group.stores, end_edge);
  }
  for (Block& block : gang.blocks) {
    for (Warp& warp : block.warps) drop_agent(warp.core.agent, end_edge);
    drop_agent(block.async.proxy, end_edge);
  }
}

}  // namespace simt

namespace prim {

using simt::Block;
using simt::current;
using simt::EmulatedTensorMap;
using simt::Quiet;

void fence_proxy_async() {
  Quiet quiet;
  simt::release(&current->block->async.proxy_edge);
  current->block->async.fence_seen = true;
}
void fence_proxy_async_all() {
  Quiet quiet;
  for (Block& block : current->gang->blocks) {
    simt::release(&block.async.proxy_edge);
    block.async.fence_seen = true;
  }
}

void tma_prefetch(const TensorMap& map) {
  Quiet quiet;
  EmulatedTensorMap description;
  std::memcpy(&description, &map, sizeof description);
  simt::read_map(map, description.rank, "prefetch.tensormap");
}

/// An H100 stops with "illegal instruction" otherwise.
static void check_innermost(const EmulatedTensorMap& map, int coordinate) {
  if (coordinate * map.element_bytes % 16 != 0)
    simt::fail("tensor copy: the innermost coordinate is no multiple of 16 bytes");
}

void tma_load(void* dst, const TensorMap& map, u32 rank, const int* c, u64* bar, u32 mask) {
  Quiet quiet;
  const EmulatedTensorMap description = simt::read_map(map, rank, "tensor copy");
  const u32 tile = simt::shared_address(dst, simt::box_bytes(description));
  const u32 barrier = simt::shared_address(bar, 8);
  if (tile % 128 != 0) simt::fail("tensor copy: the tile is not 128-byte aligned");
  check_innermost(description, c[0]);
  const simt::Coordinates at = simt::coordinates(c, rank);
  if (mask == 0) return simt::load_box(description, at, current->block, tile, barrier);
  mask &= 0xffff;
  if (mask == 0 || mask >> current->gang->blocks.size() != 0)
    simt::fail("multicast: the mask names no block or one outside the cluster");
  for (u32 i = 0; i < current->gang->blocks.size(); ++i)
    if ((mask >> i & 1) != 0)
      simt::load_box(description, at, &simt::cluster_block(i), tile, barrier);
}

void tma_store(const TensorMap& map, const void* src, u32 rank, const int* c) {
  Quiet quiet;
  const EmulatedTensorMap description = simt::read_map(map, rank, "tensor store");
  const u32 bytes = simt::box_bytes(description), tile = simt::shared_address(src, bytes);
  if (tile % 128 != 0) simt::fail("tensor store: the tile is not 128-byte aligned");
  for (u32 i = 0; i < rank; ++i)
    if (c[i] < 0) simt::fail("tensor store: a coordinate is negative");
  check_innermost(description, c[0]);
  // An H100 writes the 16 bytes in which the tensor's row ends as a whole.
  const u32 width = description.last[0] + 1;
  if (width * description.element_bytes % 16 != 0 &&
      static_cast<u32>(c[0]) + description.box[0] > width)
    simt::fail("tensor store: the tensor's rows, which clip it, are no multiple of 16 bytes");
  Block* block = current->block;
  simt::Store store{description,
                    simt::coordinates(c, rank),
                    simt::shared_pointer(block, tile, bytes),
                    {},
                    std::vector<char>(bytes),
                    simt::create_agent(),
                    simt::create_agent(),
                    std::make_shared<char>()};
  store.seen.assign(store.source, store.source + bytes);
  simt::agent_read(store.reader, store.source, bytes);
  const char* view = simt::async_view(block, tile, bytes, store.proxy_edge.get());
  for (u32 offset = 0; offset < bytes; offset += 16) {
    const u32 from = simt::chunk_address(description, tile, offset) - tile;
    std::memcpy(&store.data[offset], view + from, 16);
  }
  simt::for_each_row(description, store.at, [&](u32, const simt::Row& target) {
    if (target.bytes == 0) return;
    simt::agent_write(store.writer, target.global, target.bytes);
    std::memset(target.global, 0xff, target.bytes);
  });
  current->open_stores.push_back(std::move(store));
}

void tma_store_commit() {
  Quiet quiet;
  current->store_groups.push_back({std::move(current->open_stores), false});
  current->open_stores.clear();
}

void tma_store_wait_pending(u32 pending, bool read_only) {
  Quiet quiet;
  auto& groups = current->store_groups;
  if (groups.size() <= pending) return;
  const std::size_t done = groups.size() - pending;
  for (std::size_t i = 0; i < done; ++i) simt::read_group(groups[i]);
  if (read_only) return;
  for (std::size_t i = 0; i < done; ++i) {
    for (const simt::Store& store : groups.front().stores) {
      simt::write_target(store);
      simt::join_agent(store.writer);
    }
    groups.pop_front();
  }
}

void bulk_load(void* dst, const void* src, u32 bytes, u64* bar) {
  Quiet quiet;
  const u32 to = simt::shared_address(dst, bytes), barrier = simt::shared_address(bar, 8);
  if (bytes == 0 || bytes % 16 != 0 || to % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(src) % 16 != 0)
    simt::fail("bulk copy: size and addresses are multiples of 16");
  Block* block = current->block;
  simt::shared_barrier(block, barrier, "bulk copy");
  simt::touch_read(bar, 8);
  simt::start_flight(block, to, bytes, [=](void* agent) {
    simt::agent_read(agent, src, bytes);
    simt::async_write(block, to, static_cast<const char*>(src), bytes);
    simt::finish_copy(block, to, bytes, barrier, agent, "bulk copy");
  });
}

// A store of `values` to another block; `barrier` lies in the same one.
static void remote_async(u32* own, u32 rank, const u32* values, u32 bytes, u64* bar) {
  Quiet quiet;
  const u32 to = simt::shared_address(own, bytes), barrier = simt::shared_address(bar, 8);
  if (to % bytes != 0) simt::fail("st.async: misaligned address");
  if (current->gang->blocks.size() < 2) simt::fail("st.async outside a cluster");
  Block* target = &simt::cluster_block(rank);
  simt::shared_barrier(target, barrier, "st.async");
  simt::touch_read(simt::shared_pointer(target, barrier, 8), 8);
  const std::vector<u32> data(values, values + bytes / 4);
  simt::start_flight(target, to, bytes, [=](void* agent) {
    char* place = simt::shared_pointer(target, to, bytes);
    simt::agent_write(agent, place, bytes);
    std::memcpy(place, data.data(), bytes);
    simt::complete_bytes(simt::shared_barrier(target, barrier, "st.async"), bytes, agent,
                         simt::Scope::kCluster);
  });
}

void st_async(u32* own, u32 rank, u32 value, u64* bar) { remote_async(own, rank, &value, 4, bar); }
void st_async_x4(u32* own, u32 rank, const u32 (&v)[4], u64* bar) {
  remote_async(own, rank, v, 16, bar);
}

void bulk_copy_remote(void* own, u32 rank, const void* src, u32 bytes, u64* bar) {
  Quiet quiet;
  const u32 to = simt::shared_address(own, bytes), from = simt::shared_address(src, bytes);
  const u32 barrier = simt::shared_address(bar, 8);
  if (bytes == 0 || bytes % 16 != 0 || to % 16 != 0 || from % 16 != 0)
    simt::fail("bulk copy: size and addresses are multiples of 16");
  Block* target = &simt::cluster_block(rank);
  simt::shared_barrier(target, barrier, "bulk copy");
  simt::touch_read(simt::shared_pointer(target, barrier, 8), 8);
  const char* source = simt::shared_pointer(current->block, from, bytes);
  const auto proxy_edge = std::make_shared<char>();
  const char* view = simt::async_view(current->block, from, bytes, proxy_edge.get());
  const std::vector<char> data(view, view + bytes), seen(source, source + bytes);
  simt::start_flight(target, to, bytes, [=](void* agent) {
    simt::agent_acquire(agent, proxy_edge.get());
    simt::agent_read(agent, source, bytes);
    if (std::memcmp(source, seen.data(), bytes) != 0)
      simt::fail("the source of a bulk copy was overwritten before its completion");
    simt::async_write(target, to, data.data(), bytes);
    simt::agent_release(agent, &target->async.proxy_edge);
    simt::agent_write(agent, simt::shared_pointer(target, to, bytes), bytes);
    simt::complete_bytes(simt::shared_barrier(target, barrier, "bulk copy"), bytes, agent,
                         simt::Scope::kCluster);
  });
}

}  // namespace prim
