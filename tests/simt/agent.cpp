#include "tests/simt/agent.h"

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

}  // namespace

void* create_agent() { return __tsan_create_fiber(0); }
void destroy_agent(void* agent) { __tsan_destroy_fiber(agent); }
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
  char edge = 0;
  agent_release(agent, &edge);
  __tsan_acquire(&edge);
  __tsan_destroy_fiber(agent);
}

#else

void* create_agent() { return nullptr; }
void destroy_agent(void*) {}
void destroy_quiet_agent(void*) {}
void agent_acquire(void*, void*) {}
void agent_release(void*, void*) {}
void agent_read(void*, const void* address, std::size_t bytes) { touch_read(address, bytes); }
void agent_write(void*, void* address, std::size_t bytes) { touch_write(address, bytes); }
void join_agent(void*) {}

#endif

}  // namespace simt
