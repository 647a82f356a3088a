# cmake -DPROGRAM=<host_conformance> -DPYTHON=<python> -DFOLDER=<folder> -P run_conformance.cmake
# The emulator computes the same under two schedules.
foreach(seed 0 5)
  execute_process(COMMAND ${PROGRAM} ${FOLDER}/seed_${seed}.txt --seed ${seed} COMMAND_ERROR_IS_FATAL ANY)
endforeach()
execute_process(COMMAND ${PYTHON} ${CMAKE_CURRENT_LIST_DIR}/compare_conformance.py ${FOLDER}/seed_5.txt
  ${FOLDER}/seed_0.txt COMMAND_ERROR_IS_FATAL ANY)
