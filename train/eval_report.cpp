#include "train/eval_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "csrc/core/file.h"

namespace xlstm::train {
namespace {

/// "count_10": what the bucket that begins at 10 holds; without loss where no target is in it.
nlohmann::ordered_json bucket_json(const std::vector<int64_t>& edges,
                                   const EvaluationResult& result) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for (size_t i = 0; i < result.groups.size(); ++i) {
    const GroupLoss& group = result.groups[i];
    nlohmann::ordered_json bucket = {{"tokens", group.tokens}};
    if (group.tokens > 0) {
      const double loss = group.nats / static_cast<double>(group.tokens);
      bucket["loss"] = loss;
      bucket["perplexity"] = std::exp(loss);
    }
    json["count_" + std::to_string(edges[i])] = bucket;
  }
  return json;
}

void print_buckets(const std::vector<int64_t>& edges, const EvaluationResult& result) {
  for (size_t i = 0; i < result.groups.size(); ++i) {
    const GroupLoss& group = result.groups[i];
    const std::string end =
        i + 1 < edges.size() ? " to " + std::to_string(edges[i + 1] - 1) : " or more";
    std::printf("tokens that occur %lld%s times: %lld", static_cast<long long>(edges[i]),
                end.c_str(), static_cast<long long>(group.tokens));
    if (group.tokens > 0)
      std::printf(", perplexity %.4f", std::exp(group.nats / static_cast<double>(group.tokens)));
    std::printf("\n");
  }
}

void print_result(const EvaluationResult& result) {
  if (result.last_error.has_value()) {
    std::printf("squared error %.6f, at the last position %.6f", result.loss, *result.last_error);
    return;
  }
  std::printf("loss %.6f nats/token | perplexity %.4f | ", result.loss, result.perplexity);
  if (result.accuracy.has_value()) {
    std::printf("accuracy %.4f, scaled %.4f", *result.accuracy, *result.scaled_accuracy);
  } else if (result.bits_per_byte > 0) {
    std::printf("bits per byte %.4f", result.bits_per_byte);
  } else {
    std::printf("bits per byte unknown (no count of bytes)");
  }
}

/// The mean that tables of several sources show: every source counts the same.
double mean_perplexity(const std::vector<JudgedSet>& sources) {
  double sum = 0;
  for (const JudgedSet& source : sources) sum += source.result.perplexity;
  return sum / static_cast<double>(sources.size());
}

nlohmann::ordered_json loss_json(const EvaluationResult& result) {
  return {{"loss", result.loss},
          {"perplexity", result.perplexity},
          {"bits_per_byte", result.bits_per_byte},
          {"tokens", result.tokens}};
}

}  // namespace

void print_report(const EvalReport& report) {
  size_t width = 0;
  for (const JudgedSet& source : report.sources) width = std::max(width, source.name.size());
  for (const JudgedSet& source : report.sources) {
    std::printf("%-*s  ", static_cast<int>(width), source.name.c_str());
    print_result(source.result);
    std::printf(" | %lld tokens\n", static_cast<long long>(source.result.tokens));
  }
  if (!report.sources.empty())
    std::printf("mean perplexity of the %zu sources %.4f\nall together: ", report.sources.size(),
                mean_perplexity(report.sources));
  print_result(report.result);
  std::printf(" | %lld tokens at context %lld\n", static_cast<long long>(report.result.tokens),
              static_cast<long long>(report.seq_len));
  print_buckets(report.bucket_edges, report.result);
}

void write_report(const std::string& path, const EvalReport& report) {
  nlohmann::ordered_json json = {{"checkpoint", report.checkpoint},
                                 {"data", report.data},
                                 {"seq_len", report.seq_len},
                                 {"trained_seq_len", report.trained_seq_len}};
  json.update(loss_json(report.result));
  json["seconds"] = report.seconds;
  if (report.result.last_error.has_value()) json["last_error"] = *report.result.last_error;
  if (report.result.accuracy.has_value()) {
    json["accuracy"] = *report.result.accuracy;
    json["scaled_accuracy"] = *report.result.scaled_accuracy;
  }
  if (!report.bucket_edges.empty())
    json["frequency"] = bucket_json(report.bucket_edges, report.result);
  if (!report.sources.empty()) {
    json["mean_perplexity"] = mean_perplexity(report.sources);
    for (const JudgedSet& source : report.sources)
      json["sources"][source.name] = loss_json(source.result);
  }
  // File names need not be UTF-8: bytes that are not become the replacement character.
  write_file_atomically(path,
                        json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

}  // namespace xlstm::train
