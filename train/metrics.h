#pragma once
// Where the numbers of a run go: console, <run>/metrics.jsonl and TensorBoard's event file, under
// the same keys:
//   train/loss             nats per target token of this step's global batch that counts
//   train/loss_hex         its exact double (JSON alone)
//   train/ppl              exp(train/loss)
//   train/grad_norm        global L2 norm before clipping
//                          (these four are absent where no target counts: the step changes nothing)
//   train/lr               of this update
//   train/tokens           input tokens consumed so far
//   train/skipped_updates  so far
//   perf/tokens_per_s, perf/step_ms, perf/data_ms (waiting for data)
//                          means since the last line, without the process's first step
//   mem/peak_gib           of this process
//   val/loss, val/ppl, val/bits_per_byte
//   val/loss_hex           its exact double (JSON alone)
//   val/set                fingerprint of the held-out set, where it has one (JSON alone)
//   ckpt/save_s, ckpt/failed (failed saves so far)
#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace xlstm::train {

using Metrics = std::vector<std::pair<std::string, double>>;
constexpr const char* kHeldOutSet = "val/set";

/// One JSON object per line in a file, each by one write(2) in append mode: a crash tears at most
/// the last line.
class JsonlWriter {
 public:
  explicit JsonlWriter(std::string path);
  ~JsonlWriter();
  JsonlWriter(const JsonlWriter&) = delete;
  JsonlWriter& operator=(const JsonlWriter&) = delete;
  /// Appends `json` and a line break. A failing write is undone and reported as a warning once.
  void write_line(std::string json);
  /// {"step":..,"time":..,<metrics>}; values that are not finite become null (JSON has no NaN). A
  /// "train/loss" or "val/loss" is followed by its hexadecimal float as a string. held_out_set: of an evaluation, "" where it has none.
  void write_metrics(int64_t step, const Metrics& metrics, const std::string& held_out_set = "");
  /// {"event":..,"step":..,"time":..,<fields>}
  void write_event(const std::string& event, int64_t step,
                   const std::vector<std::pair<std::string, std::string>>& fields = {});

 private:
  std::string path_;
  int fd_ = -1;
  bool failed_ = false;
};

/// Keeps the lines of a JSONL file whose "step" is at most `step`; the others, and a torn last
/// line, are appended to <path>.bak. Returns how many lines went there. No file: 0.
int64_t truncate_jsonl(const std::string& path, int64_t step);

/// The lines of a JSONL file that are of this step. No file: none.
std::vector<nlohmann::json> lines_of_step(const std::string& path, int64_t step);

/// The last finite value of `key` in a JSONL file; NaN where there is none.
double last_value(const std::string& path, const std::string& key);

/// TensorBoard's event file <folder>/events.out.tfevents.<time>.<host>.<pid>: TFRecords (length,
/// masked CRC32C) of hand-encoded Event messages.
class TensorboardWriter {
 public:
  /// first_step > 0 marks a resumed run: TensorBoard then drops what it read from earlier files at
  /// or after that step.
  TensorboardWriter(const std::string& folder, int64_t first_step);
  ~TensorboardWriter();
  TensorboardWriter(const TensorboardWriter&) = delete;
  TensorboardWriter& operator=(const TensorboardWriter&) = delete;
  void write_metrics(int64_t step, const Metrics& metrics);

 private:
  void write_record(const std::string& event);
  int fd_ = -1;
};

/// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78).
uint32_t crc32c(const void* data, size_t size_bytes);

/// What the console shows of a step.
struct ConsoleStep {
  int64_t step = 0, total_steps = 0;
  std::optional<double> loss = {}, grad_norm = {};  ///< nothing where no target counts: "-"
  double learning_rate = 0;
  bool in_nats = true;       ///< the loss is the logarithm of a perplexity
  double tokens_per_s = 0;   ///< 0: not known yet
  double data_fraction = 0;  ///< share of the time spent waiting for data
  double seconds_left = -1;  ///< negative: not known yet
};

/// "step 120/2000 | loss 4.8312 | ppl 125.3 | gnorm 0.81 | lr 1.6e-04 | 41.2k tok/s | data 1% | eta
/// 2m13s"
std::string format_step(const ConsoleStep& step);
/// "[########....] 800/2000 | eta 2m13s | loss 4.8312 | 41.2k tok/s | lr 1.6e-04 | gnorm 0.81":
/// what matters first, because a narrow terminal cuts the end.
std::string format_bar_line(const ConsoleStep& step);
/// As printf has it: format_number("%.2f", 1.5) is "1.50".
std::string format_number(const char* pattern, double value);
/// "950", "41.2k", "1.53M"
std::string format_count(double value);
/// "1,234,567"
std::string format_thousands(int64_t value);

/// Steps on the console: a refreshing bar on a terminal, a plain line per log.every elsewhere;
/// always to run.log.
class Console {
 public:
  /// mode: "auto" | "bar" | "plain" | "off"
  explicit Console(const std::string& mode);
  ~Console();
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;
  /// Called for every step; `logged` on those that log.every selects. Redraws at most ten times a
  /// second.
  void step(const ConsoleStep& step, bool logged);
  void finish();
  bool has_bar() const { return bar_; }

 private:
  bool bar_ = false, plain_ = false;
  double last_draw_ = 0;
};

}  // namespace xlstm::train
