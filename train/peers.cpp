#include "train/peers.h"

#include <string>
#include <utility>

#include "csrc/core/error.h"
#include "train/run_folder.h"
#include "train/signals.h"
#include "train/step_timer.h"

namespace xlstm::train {
namespace {

/// Seconds between two questions of process 0, which works alone, to those that wait.
constexpr double kBetweenQuestions = 0.1;

}  // namespace

void stop_together(ProcessGroup& group) {
  const char* signal = stop_requested();
  if (group.any(signal != nullptr))
    throw Stopped{signal != nullptr ? signal : "a signal to another process"};
}

void work_alone(ProcessGroup& group,
                const std::function<void(const std::function<void()>& poll)>& work) {
  if (group.place().leads()) {
    double asked = monotonic_seconds();
    work([&] {
      if (monotonic_seconds() - asked < kBetweenQuestions) return;
      group.any(true);  // it goes on
      stop_together(group);
      asked = monotonic_seconds();
    });
    group.any(false);
  } else {
    while (group.any(false)) stop_together(group);
  }
  stop_together(group);
}

void check_same_settings(ProcessGroup& group, const config::Config& config) {
  if (group.place().alone()) return;
  const std::string leader = group.broadcast(config::print_config(config));
  const std::string found =
      differing_setting(config, config::parse_config(leader, "settings of process 0"));
  if (group.any(!found.empty()))
    throw Error(ExitCode::kConfig,
                found.empty() ? "another process of this run has other settings and names the first"
                              : found + "; give all processes of a run the same settings");
}

void check_same_data(ProcessGroup& group, const TrainingData& data) {
  const std::pair<const char*, std::string> sets[] = {
      {"training data", data.train->fingerprint()},
      {"held-out data", data.held_out ? data.held_out->fingerprint() : "none"}};
  for (const auto& [what, own] : sets)
    if (group.any(own != group.broadcast(own)))
      throw Error(ExitCode::kData, std::string("the processes of this run do not read the same ") +
                                       what + " (this one has " + own +
                                       "); give all of them the same files and data settings");
}

}  // namespace xlstm::train
