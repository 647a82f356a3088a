#pragma once
// How a run tells what an evaluation of its held-out data found.
#include <cstdint>
#include <optional>
#include <string>

#include "train/evaluation.h"
#include "train/metrics.h"

namespace xlstm::train {

/// "held-out loss 1.2345 | ppl 3.44 | bits per byte 1.7810 | 102.4k tokens", or what else the data is judged by.
std::string held_out_line(const EvaluationResult& result);
/// The same as val/... metrics.
Metrics held_out_metrics(const EvaluationResult& result);
/// What a file of metrics tells of the last evaluation at this step by the set of this fingerprint, all but its number of
/// tokens; nothing where there was none. unnamed: the fingerprint of the set where a line names none, as those of earlier
/// versions and of sets without one.
std::optional<EvaluationResult> recorded_held_out(const std::string& path, int64_t step,
                                                  const std::string& fingerprint,
                                                  const std::string& unnamed);
/// The run's last line: "held-out bits per byte: 1.78", or its perplexity, accuracy or squared error.
std::string held_out_result(const EvaluationResult& result);

}  // namespace xlstm::train
