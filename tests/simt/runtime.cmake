# Sources of the emulator.
set(SIMT_RUNTIME agent.cpp collectives.cpp mbarrier.cpp registers.cpp sanitizer.cpp
  scheduler.cpp tensor_memory.cpp warp_primitives.cpp wgmma.cpp)
list(TRANSFORM SIMT_RUNTIME PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
