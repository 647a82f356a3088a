#pragma once
// What the processes of a run do together beside computing: agree, wait for the one that works alone, stop at the same place.
#include <functional>

#include "csrc/config/config.h"
#include "train/distributed.h"
#include "train/training_data.h"

namespace xlstm::train {

/// Throws Stopped in all processes where a signal has asked this one or another one to stop.
void stop_together(ProcessGroup& group);

/// `work` of process 0, for which the others wait. The poll that it is given, to be called all the time, asks them every
/// now and then whether a signal has come, to whichever: then all throw Stopped at the same place.
void work_alone(ProcessGroup& group,
                const std::function<void(const std::function<void()>& poll)>& work);

/// Other settings would end in a wait for ever, or in weights that come apart: Throws Error(kConfig) in all processes.
void check_same_settings(ProcessGroup& group, const config::Config& config);
/// Throws Error(kData) in all processes where one reads other data.
void check_same_data(ProcessGroup& group, const TrainingData& data);

}  // namespace xlstm::train
