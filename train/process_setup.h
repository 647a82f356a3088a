#pragma once

namespace xlstm::train {

/// Prepares a program that computes for long; call it first in main. Memory that one step frees is
/// kept for the next one instead of going back to the system, and idle worker threads wait for work
/// for a fraction of a millisecond before they sleep. The second is read by the OpenMP runtime
/// before main: the program starts itself once more for it, unless OMP_WAIT_POLICY or
/// GOMP_SPINCOUNT is set already.
void prepare_long_process(char** argv);

}  // namespace xlstm::train
