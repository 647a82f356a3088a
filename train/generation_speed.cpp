#include "train/generation_speed.h"

#include <ATen/ops/randint.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <new>
#include <numeric>
#include <utility>

#include "csrc/ops/mlstm.h"
#include "train/decoder.h"
#include "train/device.h"
#include "train/step_timer.h"

namespace xlstm::train {
namespace {

constexpr int64_t kWindow = 64;  ///< tokens by which the time of one is told
constexpr int64_t kWarmUp = 16;
constexpr int kRounds = 3;  ///< of the sequence whose tokens are timed

at::Tensor random_prompts(const models::LanguageModel& model, int64_t sequences, int64_t length) {
  return at::randint(0, model.options().vocab_size, {sequences, length}, at::kLong)
      .to(model.head_weight().device());
}

/// A decoder behind all tokens of the prompts but the last, which it is to take next.
Decoder behind(models::LanguageModel& model, const at::Tensor& prompts,
               std::optional<bool> lazy_fold) {
  models::ModelState state;
  if (prompts.size(1) > 1)
    state = model.hidden(prompts.narrow(1, 0, prompts.size(1) - 1), {}, {}).second;
  return Decoder(model, std::move(state), lazy_fold, prompts.size(0));
}

double measure_throughput(models::LanguageModel& model, int64_t prompt, int64_t sequences,
                          int64_t tokens, std::optional<bool> lazy_fold) {
  const at::Tensor prompts = random_prompts(model, sequences, prompt);
  const at::Device device = prompts.device();
  Decoder decoder = behind(model, prompts, lazy_fold);
  at::Tensor next = prompts.narrow(1, prompt - 1, 1);
  std::vector<double> seconds;
  for (int64_t i = 0; i < kWarmUp + tokens; ++i) {
    wait_for(device);
    const double start = monotonic_seconds();
    next = decoder.next(next).argmax(1, true);
    wait_for(device);
    if (i >= kWarmUp) seconds.push_back(monotonic_seconds() - start);
  }
  return static_cast<double>(sequences) / seconds_per_step(seconds);
}

GenerationTimes time_once(models::LanguageModel& model, const at::Tensor& prompts,
                          const std::vector<int64_t>& positions, std::optional<bool> lazy_fold) {
  const at::Device device = prompts.device();
  wait_for(device);
  const double begin = monotonic_seconds();
  Decoder decoder = behind(model, prompts, lazy_fold);
  at::Tensor next = prompts.narrow(1, prompts.size(1) - 1, 1);
  GenerationTimes times;
  std::vector<double> seconds;
  for (const int64_t position : positions) {
    while (static_cast<int64_t>(seconds.size()) < position) {
      const double start = monotonic_seconds();
      next = decoder.next(next).argmax(1, true);
      wait_for(device);
      seconds.push_back(monotonic_seconds() - start);
    }
    times.until_s.push_back(monotonic_seconds() - begin);
    times.token_s.push_back(
        seconds_per_step({seconds.end() - std::min(kWindow, position), seconds.end()}));
  }
  return times;
}

}  // namespace

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double seconds_per_step(const std::vector<double>& seconds) {
  const int64_t steps = static_cast<int64_t>(seconds.size()),
                group = std::min(ops::MlstmRing::kTokens, steps);
  std::vector<double> means;
  for (auto end = seconds.end(); end - seconds.begin() >= group; end -= group)
    means.push_back(std::accumulate(end - group, end, 0.0) / static_cast<double>(group));
  return median(std::move(means));
}

GenerationTimes time_generation(models::LanguageModel& model, int64_t prompt,
                                const std::vector<int64_t>& positions,
                                std::optional<bool> lazy_fold) {
  const at::Tensor prompts = random_prompts(model, 1, prompt);
  GenerationTimes times = time_once(model, prompts, positions, lazy_fold);
  for (int round = 1; round < kRounds; ++round) {
    const GenerationTimes again = time_once(model, prompts, positions, lazy_fold);
    for (size_t i = 0; i < positions.size(); ++i) {
      times.token_s[i] = std::min(times.token_s[i], again.token_s[i]);
      times.until_s[i] = std::min(times.until_s[i], again.until_s[i]);
    }
  }
  return times;
}

std::optional<double> generation_throughput(models::LanguageModel& model, int64_t prompt,
                                            int64_t sequences, int64_t tokens,
                                            std::optional<bool> lazy_fold) {
  try {
    return measure_throughput(model, prompt, sequences, tokens, lazy_fold);
  } catch (const c10::OutOfMemoryError&) {
    return {};
  } catch (const std::bad_alloc&) {
    return {};
  }
}

}  // namespace xlstm::train
