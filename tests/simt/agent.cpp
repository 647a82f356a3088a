#include "tests/simt/agent.h"

#include <memory>
#include <vector>

#include "tests/simt/sanitizer.h"

namespace simt {

#if defined(SIMT_TSAN)

namespace {

/// The sanitizer takes the accesses inside the scope for the agent's.
class Acting {
 public:
  explicit Acting(void* agent) : home_(__tsan_get_current_fiber()) {
    __tsan_switch_to_fiber(agent, 1);
  }
  ~Acting() { __tsan_switch_to_fiber(home_, 1); }
  Acting(const Acting&) = delete;
  Acting& operator=(const Acting&) = delete;

 private:
  void* home_;
};

// Making one costs half a millisecond. Of a launch that is over the host knows everything, and a thread of the next
// launch may know it too; within a launch a used thread would know what it must not.
constexpr std::size_t kKept = 2048;
std::vector<void*> idle, used;

}  // namespace

void* create_agent() {
  if (idle.empty()) return __tsan_create_fiber(0);
  void* agent = idle.back();
  idle.pop_back();
  const auto edge = std::make_unique<char>();  // freed memory holds no old edge
  __tsan_release(edge.get());
  agent_acquire(agent, edge.get());
  return agent;
}
void destroy_agent(void* agent) {
  if (idle.size() + used.size() < kKept) {
    used.push_back(agent);
  } else {
    __tsan_destroy_fiber(agent);
  }
}
void recycle_agents() {
  idle.insert(idle.end(), used.begin(), used.end());
  used.clear();
}
void destroy_quiet_agent(void* agent) {
  {
    Acting acting(agent);
    ignore_end();
  }
  __tsan_destroy_fiber(agent);
}
void agent_acquire(void* agent, void* edge) {
  Acting acting(agent);
  __tsan_acquire(edge);
}
void agent_release(void* agent, void* edge) {
  Acting acting(agent);
  __tsan_release(edge);
}
void agent_read(void* agent, const void* address, std::size_t bytes) {
  Acting acting(agent);
  __tsan_read_range(const_cast<void*>(address), bytes);
}
void agent_write(void* agent, void* address, std::size_t bytes) {
  Acting acting(agent);
  __tsan_write_range(address, bytes);
}
void join_agent(void* agent) {
  const auto edge = std::make_unique<char>();
  agent_release(agent, edge.get());
  __tsan_acquire(edge.get());
  destroy_agent(agent);
}

#else

void* create_agent() { return nullptr; }
void destroy_agent(void*) {}
void destroy_quiet_agent(void*) {}
void recycle_agents() {}
void agent_acquire(void*, void*) {}
void agent_release(void*, void*) {}
void agent_read(void*, const void* address, std::size_t bytes) { touch_read(address, bytes); }
void agent_write(void*, void* address, std::size_t bytes) { touch_write(address, bytes); }
void join_agent(void*) {}

#endif

}  // namespace simt
