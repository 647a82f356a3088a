#include "train/held_out.h"

#include <cstdlib>
#include <nlohmann/json.hpp>

namespace xlstm::train {

std::string held_out_line(const EvaluationResult& result) {
  std::string line = "held-out loss " + format_number("%.4f", result.loss);
  line += result.last_error.has_value() ? " (squared error) | at the last position " +
                                              format_number("%.4f", *result.last_error)
                                        : " | ppl " + format_number("%.2f", result.perplexity);
  if (result.bits_per_byte > 0)
    line += " | bits per byte " + format_number("%.4f", result.bits_per_byte);
  if (result.accuracy.has_value())
    line += " | accuracy " + format_number("%.4f", *result.accuracy) + ", scaled " +
            format_number("%.4f", *result.scaled_accuracy);
  return line + " | " + format_count(static_cast<double>(result.tokens)) + " tokens";
}

Metrics held_out_metrics(const EvaluationResult& result) {
  Metrics metrics = {{"val/loss", result.loss}};
  if (result.last_error.has_value()) {
    metrics.emplace_back("val/last_error", *result.last_error);
  } else {
    metrics.emplace_back("val/ppl", result.perplexity);
  }
  if (result.bits_per_byte > 0) metrics.emplace_back("val/bits_per_byte", result.bits_per_byte);
  if (result.accuracy.has_value()) {
    metrics.emplace_back("val/accuracy", *result.accuracy);
    metrics.emplace_back("val/scaled_accuracy", *result.scaled_accuracy);
  }
  return metrics;
}

std::optional<EvaluationResult> recorded_held_out(const std::string& path, int64_t step,
                                                  const std::string& fingerprint,
                                                  const std::string& unnamed) {
  std::optional<EvaluationResult> result;
  for (const nlohmann::json& line : lines_of_step(path, step)) {
    const auto number = [&](const char* key) {
      const auto found = line.find(key);
      return found != line.end() && found->is_number() ? std::optional(found->get<double>())
                                                       : std::nullopt;
    };
    const std::optional<double> loss = number("val/loss");
    const std::string judged_by = line.value(kHeldOutSet, unnamed);
    if (!loss || (!judged_by.empty() && judged_by != fingerprint)) continue;
    result.emplace();
    const std::string exact = line.value("val/loss_hex", "");  // absent in older ones
    result->loss = exact.empty() ? *loss : std::strtod(exact.c_str(), nullptr);
    result->perplexity = number("val/ppl").value_or(0);
    result->bits_per_byte = number("val/bits_per_byte").value_or(0);
    result->accuracy = number("val/accuracy");
    result->scaled_accuracy = number("val/scaled_accuracy");
    result->last_error = number("val/last_error");
  }
  return result;
}

std::string held_out_result(const EvaluationResult& result) {
  if (result.last_error.has_value())
    return "held-out squared error: " + format_number("%.4f", result.loss) +
           ", at the last position " + format_number("%.4f", *result.last_error);
  if (result.accuracy.has_value())
    return "held-out accuracy: " + format_number("%.4f", *result.accuracy) + ", scaled " +
           format_number("%.4f", *result.scaled_accuracy);
  if (result.bits_per_byte > 0)
    return "held-out bits per byte: " + format_number("%.2f", result.bits_per_byte);
  return "held-out perplexity: " + format_number("%.2f", result.perplexity);
}

}  // namespace xlstm::train
