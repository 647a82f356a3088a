#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "csrc/data/batch.h"
#include "csrc/models/language_model.h"
#include "train/distributed.h"

namespace xlstm::train {

/// Tokens that are also judged apart from the others.
struct TokenGroups {
  std::vector<int64_t> of_token;  ///< group of each token id, below `count`
  int64_t count = 0;
};

struct GroupLoss {
  double nats = 0;     ///< of all its tokens
  int64_t tokens = 0;  ///< targets that are in the group
};

struct EvaluationResult {
  double loss = 0;  ///< nats per scored token
  double perplexity = 0;
  double bits_per_byte = 0;  ///< 0 when the data set does not know its bytes
  int64_t tokens = 0;        ///< tokens scored
  /// Of a task: the share of answers that are the likeliest token, and (accuracy - chance) / (1 - chance).
  std::optional<double> accuracy, scaled_accuracy;
  /// With real inputs, where `loss` is the mean squared error: that of each sample's last position.
  std::optional<double> last_error;
  std::vector<GroupLoss> groups;  ///< where groups were asked for
};

struct EvaluationOptions {
  int64_t max_windows = 0;              ///< 0: the whole set
  bool bfloat16 = false;                ///< autocast
  bool show_progress = false;           ///< a bar on standard error
  const TokenGroups* groups = nullptr;  ///< targets by their token, of a set of texts
  /// Each judges a share of the batches, and all know the result.
  ProcessGroup* processes = nullptr;
  /// Called as often by each process; what it throws ends the evaluation.
  std::function<void()> after_batch = [] {};
};

/// Token-weighted mean over a fixed set, without gradients. Nothing is dropped, whatever mode the model is in.
EvaluationResult evaluate(models::LanguageModel& model, const data::HeldOutSet& data,
                          int64_t batch_size, const EvaluationOptions& options = {});

struct JudgedSet {
  std::string name;
  EvaluationResult result;
};

/// Of several sets of texts as if they were one.
EvaluationResult combined(const std::vector<JudgedSet>& sets);

}  // namespace xlstm::train
