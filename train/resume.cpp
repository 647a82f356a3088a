// Which checkpoint a run goes on from, and whether its settings allow that.
#include <filesystem>
#include <sstream>

#include "csrc/core/error.h"
#include "train/checkpoint.h"
#include "train/log.h"
#include "train/run_folder.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

std::string choose_newest_good(const RunFolder& folder, const std::vector<std::string>& checkpoints,
                               bool verify) {
  std::string first_problem;
  for (auto it = checkpoints.rbegin(); it != checkpoints.rend(); ++it) {
    try {
      if (verify) verify_checkpoint(*it);
      return *it;
    } catch (const Error& error) {
      log_warning(std::string(error.what()) + "; falling back to the checkpoint before it");
      if (first_problem.empty()) first_problem = error.what();
    }
  }
  throw Error(ExitCode::kCheckpoint,
              "run folder " + folder.path() + ": no good checkpoint is left (" + first_problem +
                  "); start over with --fresh, which keeps the old folder beside it");
}

std::string choose_named(const RunFolder& folder, const std::vector<std::string>& checkpoints,
                         const std::string& name, bool verify) {
  const int64_t step = checkpoint_step(name);
  std::string known;
  for (const std::string& checkpoint : checkpoints) {
    if (checkpoint_step(checkpoint) == step && step >= 0) {
      if (verify) verify_checkpoint(checkpoint);
      return checkpoint;
    }
    known += (known.empty() ? "" : ", ") + fs::path(checkpoint).filename().string();
  }
  throw Error(ExitCode::kCheckpoint, "run folder " + folder.path() + ": no checkpoint " + name +
                                         "; there is " + (known.empty() ? "none" : known));
}

/// Collects "name: now vs. then" comparisons and reports the first difference.
class Comparison {
 public:
  explicit Comparison(std::string saved_in) : saved_in_(std::move(saved_in)) {}

  template <typename Value>
  void same(const char* name, const Value& now, const Value& saved) {
    if (now == saved) return;
    throw Error(ExitCode::kConfig, std::string(name) + ": " + text(now) + " now, but the run in " +
                                       saved_in_ + " was trained with " + text(saved) +
                                       "; put it back, or start over with --fresh");
  }

 private:
  template <typename Value>
  static std::string text(const Value& value) {
    std::ostringstream out;
    if constexpr (requires { value.begin(); } && !std::is_same_v<Value, std::string>) {
      out << "[";
      for (size_t i = 0; i < value.size(); ++i) out << (i > 0 ? ", " : "") << value[i];
      out << "]";
    } else {
      out << std::boolalpha << value;
    }
    return out.str();
  }
  std::string saved_in_;
};

void compare_models(Comparison& compare, const models::ModelOptions& now,
                    const models::ModelOptions& saved) {
  compare.same("model.kind", now.kind, saved.kind);
  compare.same("model.vocab_size", now.vocab_size, saved.vocab_size);
  compare.same("model.input_features", now.input_features, saved.input_features);
  compare.same("model.embedding_dim", now.embedding_dim, saved.embedding_dim);
  compare.same("model.num_blocks", now.num_blocks, saved.num_blocks);
  compare.same("model.num_heads", now.num_heads, saved.num_heads);
  compare.same("model.max_positions", now.max_positions, saved.max_positions);
  compare.same("model.tie_weights", now.tie_weights, saved.tie_weights);
  compare.same("model.output_logit_soft_cap", now.output_logit_soft_cap,
               saved.output_logit_soft_cap);
  compare.same("model.dropout", now.dropout, saved.dropout);
  compare.same("model.add_embedding_dropout", now.add_embedding_dropout,
               saved.add_embedding_dropout);
  compare.same("model.add_out_norm", now.add_out_norm, saved.add_out_norm);
  compare.same("model.norm_eps", now.norm_eps, saved.norm_eps);
  compare.same("model.mlstm_eps", now.mlstm_eps, saved.mlstm_eps);
  compare.same("model.slstm_at", now.slstm_at, saved.slstm_at);
  compare.same("model.bias", now.bias, saved.bias);
  compare.same("model.mlstm.proj_factor", now.mlstm.proj_factor, saved.mlstm.proj_factor);
  compare.same("model.mlstm.round_proj_up_to_multiple_of", now.mlstm.round_proj_up_to_multiple_of,
               saved.mlstm.round_proj_up_to_multiple_of);
  compare.same("model.mlstm.conv1d_kernel_size", now.mlstm.conv1d_kernel_size,
               saved.mlstm.conv1d_kernel_size);
  compare.same("model.mlstm.qkv_proj_blocksize", now.mlstm.qkv_proj_blocksize,
               saved.mlstm.qkv_proj_blocksize);
  compare.same("model.mlstm.input_gate", now.mlstm.input_gate, saved.mlstm.input_gate);
  compare.same("model.mlstm.normalize", now.mlstm.normalize, saved.mlstm.normalize);
  compare.same("model.slstm.conv1d_kernel_size", now.slstm.conv1d_kernel_size,
               saved.slstm.conv1d_kernel_size);
  compare.same("model.slstm.cell", now.slstm.cell, saved.slstm.cell);
  compare.same("model.feed_forward.proj_factor", now.feed_forward.proj_factor,
               saved.feed_forward.proj_factor);
  compare.same("model.feed_forward.round_up_to_multiple_of",
               now.feed_forward.round_up_to_multiple_of,
               saved.feed_forward.round_up_to_multiple_of);
  compare.same("model.feed_forward.act_fn", now.feed_forward.act_fn, saved.feed_forward.act_fn);
  compare.same("model.qk_dim_factor", now.qk_dim_factor, saved.qk_dim_factor);
  compare.same("model.v_dim_factor", now.v_dim_factor, saved.v_dim_factor);
  compare.same("model.gate_soft_cap", now.gate_soft_cap, saved.gate_soft_cap);
}

}  // namespace

int64_t checkpoint_step(const std::string& folder) {
  const std::string name = fs::path(folder).filename();
  if (name.size() < 6 || name.size() > 22 || name.rfind("step-", 0) != 0) return -1;
  if (name.find_first_not_of("0123456789", 5) != std::string::npos) return -1;
  return std::stoll(name.substr(5));
}

std::optional<std::string> choose_checkpoint(const RunFolder& folder,
                                             const config::Config& config) {
  const std::string& resume = config.run.resume;
  if (resume == "never") {
    if (!folder.held_run()) return std::nullopt;
    throw Error(ExitCode::kCheckpoint,
                "run folder " + folder.path() +
                    ": holds a run, and run.resume is never; go on with run.resume=auto, or start "
                    "over with --fresh, which keeps the old folder beside it");
  }
  const std::vector<std::string> checkpoints = list_checkpoints(folder.path());
  if (resume != "auto")
    return choose_named(folder, checkpoints, resume, config.ckpt.verify_on_load);
  if (checkpoints.empty()) return std::nullopt;
  return choose_newest_good(folder, checkpoints, config.ckpt.verify_on_load);
}

void set_aside_later_checkpoints(const RunFolder& folder, int64_t step) {
  std::string target;
  const std::string root = folder.file("ckpt");
  if (!fs::is_directory(root)) return;
  std::vector<fs::path> later;
  for (const auto& entry : fs::directory_iterator(root)) {
    if (checkpoint_step(entry.path()) > step) later.push_back(entry.path());
  }
  for (const fs::path& checkpoint : later) {
    for (int number = 1; target.empty(); ++number) {
      const std::string name = folder.file("ckpt-old-" + std::to_string(number));
      if (fs::create_directory(name)) target = name;
    }
    fs::rename(checkpoint, fs::path(target) / checkpoint.filename());
    log_info("set aside " + checkpoint.string() + " in " + target);
  }
}

void check_same_run(const config::Config& now, const config::Config& saved,
                    const std::string& saved_in) {
  Comparison compare(saved_in);
  compare_models(compare, now.model, saved.model);
  compare.same("train.global_batch_size", now.train.global_batch_size,
               saved.train.global_batch_size);
  compare.same("data.seq_len", now.data.seq_len, saved.data.seq_len);
  compare.same("data.shuffle", now.data.shuffle, saved.data.shuffle);
  compare.same("data.shuffle_seed", now.data.shuffle_seed, saved.data.shuffle_seed);
  compare.same("data.reset_state_at_document", now.data.reset_state_at_document,
               saved.data.reset_state_at_document);
  compare.same("data.mask_loss_across_documents", now.data.mask_loss_across_documents,
               saved.data.mask_loss_across_documents);
}

}  // namespace xlstm::train
