// xlstm-train: trains a language model from a YAML file.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/error.h"
#include "csrc/core/shell.h"
#include "train/command_line.h"
#include "train/distributed.h"
#include "train/dry_run.h"
#include "train/log.h"
#include "train/process_setup.h"
#include "train/schedule.h"
#include "train/signals.h"
#include "train/trainer.h"
#include "train/training_data.h"

namespace {

using xlstm::Error;
using xlstm::ExitCode;
namespace train = xlstm::train;

const std::vector<train::OptionSpec> kOptions = {
    {"--dry-run", "",
     "parameters, memory, tokens, check of data and given weights, one step; trains nothing"},
    {"--describe", "",
     "parameters, operations, memory, tokens and steps as JSON, a line for each of any number of "
     "files"},
    {"--print-config", "", "every setting with its value, as YAML that loads again"},
    {"--fresh", "", "start over; an existing run is moved to NAME.old-N"},
    {"--resume", "step-N",
     "go on from this checkpoint; the same command again goes on from where that stopped (also: "
     "auto, never); the same as run.resume=step-N"},
    {"--quiet", "", "warnings and the result alone"},
    {"--debug", "", "more messages, and errors in full"},
    {"--help", "", "this text, with every setting"},
};

void print_help() {
  std::printf(
      "usage: xlstm-train CONFIG.yaml [key.sub=value ...] [options]\n\n"
      "Trains a language model. The same command again goes on where the run stopped.\n\n%s\n"
      "Exit status: 0 done, 1 an error of another kind, 2 configuration or command line, 3 data, "
      "4 checkpoint, run folder or disk,\n"
      "5 a loss or gradient is not finite, 6 another process failed, 7 out of memory, 75 asked to "
      "stop (SIGTERM, SIGINT,\n"
      "SIGUSR1) with everything saved: run the same command again.\n\n%s",
      train::format_options(kOptions).c_str(), xlstm::config::config_help().c_str());
}

std::string shell_command(const std::vector<std::string>& arguments) {
  std::string command = train::place_from_environment().alone() ? "" : "torchrun ... --no-python ";
  for (const std::string& argument : arguments) {
    if (&argument != &arguments.front()) command += " ";
    command += xlstm::shell_quoted(argument);
  }
  return command;
}

/// The command line without what would throw away, or refuse, the run that it is to go on with. Behind "--" nothing is an
/// option or a setting.
std::vector<std::string> arguments_to_go_on(const std::vector<std::string>& arguments,
                                            const std::string& resume) {
  std::vector<std::string> kept;
  const auto positional = std::find(arguments.begin(), arguments.end(), "--");
  for (auto argument = arguments.begin(); argument != positional; ++argument) {
    if (*argument == "--resume") {
      ++argument;  // its value
    } else if (*argument != "--fresh" && !argument->starts_with("--resume=") &&
               !argument->starts_with("run.resume=")) {
      kept.push_back(*argument);
    }
  }
  if (resume != "auto") kept.push_back("--resume=auto");  // the file may say otherwise
  kept.insert(kept.end(), positional, arguments.end());
  return kept;
}

Error memory_error(const xlstm::config::Config& config) {
  const int64_t micro = train::micro_batch(config, train::place_from_environment().size);
  const std::string half = std::to_string(micro > 1 ? micro / 2 : 1);
  return Error(ExitCode::kMemory,
               "out of memory at micro batch " + std::to_string(micro) + " x " +
                   std::to_string(config.data.seq_len) +
                   " tokens; try train.micro_batch_size=" + half +
                   " (same result, less memory), model.activation_checkpointing=true, or a smaller "
                   "data.seq_len; "
                   "--dry-run shows the estimate");
}

int train_or_report_memory(const xlstm::config::Config& config,
                           const train::TrainerOptions& options, bool dry) {
  try {
    if (dry) {
      train::dry_run(config, options.fresh);
      return 0;
    }
    train::install_signal_handlers();
    const ExitCode status = train::Trainer(config, options).run();
    // What a run leaves is in its folder: a console that nobody reads any more is no failure of it.
    if (std::freopen("/dev/null", "w", stdout) == nullptr) std::clearerr(stdout);
    return static_cast<int>(status);
  } catch (const std::exception& error) {
    if (train::is_out_of_memory(error)) throw memory_error(config);
    throw;
  }
}

/// --dry-run and --describe also tell of a model alone, without data: nothing else of a training run is judged then.
void validate_where_it_trains(const xlstm::config::Config& config) {
  if (train::has_data(config)) xlstm::config::validate_for_training(config);
}

int run(int argc, char** argv) {
  const train::CommandLine line = train::parse_command_line(argc, argv, kOptions, true);
  if (line.has("--help")) {
    print_help();
    return 0;
  }
  if (line.has("--describe") && !line.positional.empty()) {
    for (const std::string& path : line.positional) {
      const auto config = xlstm::config::load_config(path, line.overrides);
      validate_where_it_trains(config);
      std::puts(train::describe_run(config).c_str());
    }
    return 0;
  }
  if (line.positional.size() != 1) {
    throw Error(
        ExitCode::kConfig,
        "expected one configuration file; usage: xlstm-train CONFIG.yaml [key.sub=value ...]");
  }
  std::vector<std::string> overrides = line.overrides;
  if (line.has("--resume")) overrides.push_back("run.resume=" + line.get("--resume", "auto"));
  const xlstm::config::Config config = xlstm::config::load_config(line.positional[0], overrides);
  if (line.has("--print-config")) {
    std::fputs(xlstm::config::print_config(config).c_str(), stdout);
    return 0;
  }
  if (line.has("--dry-run")) {
    validate_where_it_trains(config);
  } else {
    xlstm::config::validate_for_training(config);
  }
  const bool quiet = line.has("--quiet");
  train::set_console_verbosity(quiet                 ? train::Verbosity::kQuiet
                               : line.has("--debug") ? train::Verbosity::kDebug
                                                     : train::Verbosity::kNormal);
  if (config.run.num_threads > 0) at::set_num_threads(static_cast<int>(config.run.num_threads));
  const std::vector<std::string> arguments(argv, argv + argc);
  const train::TrainerOptions options{
      line.has("--fresh"), quiet, shell_command(arguments),
      shell_command(arguments_to_go_on(arguments, config.run.resume))};
  try {
    return train_or_report_memory(config, options, line.has("--dry-run"));
  } catch (const std::exception& error) {
    train::show_bar("");
    if (line.has("--debug")) std::fprintf(stderr, "%s\n", error.what());
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  train::prepare_long_process(argv);
  return train::run_main(
      "xlstm-train",
      "lower train.micro_batch_size or data.seq_len, or set model.activation_checkpointing=true",
      [&] { return run(argc, argv); });
}
