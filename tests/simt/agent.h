#pragma once
// Threads of the sanitizer that stand for hardware which works on its own: the copy engine, the tensor cores. What an
// agent reads or writes races with threads that are not ordered with it. Without the thread sanitizer an agent is a
// null pointer, and its accesses are checked for poisoned addresses alone.
#include <cstddef>

namespace simt {

/// Ordered after everything the calling thread has done so far.
void* create_agent();
void destroy_agent(void* agent);
/// The same for a thread that stopped inside a Quiet scope.
void destroy_quiet_agent(void* agent);
/// After a launch, when the host is ordered after everything in it: destroyed agents may be used again.
void recycle_agents();
void agent_acquire(void* agent, void* edge);
void agent_release(void* agent, void* edge);
void agent_read(void* agent, const void* address, std::size_t bytes);
void agent_write(void* agent, void* address, std::size_t bytes);
/// The calling thread is ordered after the agent, which ends.
void join_agent(void* agent);

}  // namespace simt
