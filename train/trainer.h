#pragma once
// The training loop. One step has numbered phases, in this order:
//   1 data       the next batch, prepared by a thread while the step before ran
//   2 forward and backward, per micro batch
//   3 finite check of loss and gradient norm, before anything is changed; and nothing is where no target counts
//   4 clip       5 learning rate      6 optimizer      7 log      8 save
//   9 signals: asked to stop -> save, exit status 75
//   10 evaluate, and save where that is the lowest loss so far (ckpt.keep_best) or the last evaluation
//      that eval.patience allows  11 sample: between their batches and tokens signals are looked for, too, those to
//      any process of the run
// Evaluations and samples that a stop or a crash has cut off are made up for when the run goes on,
// and a finished run that has them all is left as it is.
// A step is a pure function of (weights, optimizer state, random stream, step number), all of which
// a checkpoint holds: a resumed run has the bits of one that was never stopped, for the same number
// of threads.
#include <cstdint>
#include <memory>
#include <string>

#include "csrc/config/config.h"
#include "csrc/core/error.h"

namespace xlstm::train {

struct TrainerOptions {
  bool fresh = false;                            ///< move an existing run aside first
  bool quiet = false;                            ///< no step lines
  std::string command = "xlstm-train";           ///< recorded
  std::string command_to_go_on = "xlstm-train";  ///< shown where the run is stopped
};

class Trainer {
 public:
  Trainer(const config::Config& config, const TrainerOptions& options);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// Starts or resumes the run and trains to its end: kOk, or kPreempted when a signal stopped it
  /// with everything saved or nothing done yet. Its end is train.max_steps or eval.patience. The last line on standard output is "held-out bits
  /// per byte: N.NN" ("held-out perplexity: N.NN" where the data does not know its bytes, "final
  /// training loss: N.NNNN" without held-out data). Throws Error with its exit status.
  ExitCode run();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace xlstm::train
