#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "train/distributed.h"
#include "train/tensor_row.h"

namespace xlstm::train {

/// Gradients summed over processes while the backward pass still computes others (arXiv 2006.15704). Parameters stand in
/// buckets, those registered last first: their gradients come first. The sum of a bucket begins once all its gradients and
/// all buckets before it are there, so that every process sums the same ones in the same order, whenever it comes to them.
class GradientSums {
 public:
  /// parameters: in registration order; which of them have gradients is the same in all processes. group must outlive this.
  GradientSums(const std::vector<at::Tensor>& parameters, ProcessGroup& group,
               int64_t bucket_bytes = kBucketBytes);
  GradientSums(const GradientSums&) = delete;
  GradientSums& operator=(const GradientSums&) = delete;

  /// Around the last backward pass before finish(): sums begin while it lives.
  class Scope {
   public:
    /// sums: null where nothing is summed.
    explicit Scope(GradientSums* sums);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    GradientSums* sums_;
  };

  /// Sums what is left, and `also`, and waits: as ProcessGroup::Wait does. Gradients are dense then.
  void finish(const at::Tensor& also);

 private:
  /// While one bucket is on its way the next is computed: a model of a few MiB has several, too.
  static constexpr int64_t kBucketBytes = int64_t{8} << 20;
  class Hook;
  struct Bucket {
    TensorRow parameters;
    size_t missing;  ///< gradients that have not come yet
  };
  void arrived(Bucket& bucket);
  void begin_next();

  ProcessGroup& group_;
  std::vector<Bucket> buckets_;
  size_t begun_ = 0;  ///< buckets
  std::vector<ProcessGroup::Wait> under_way_;
  std::optional<c10::Stream> stream_;  ///< of the scope
};

}  // namespace xlstm::train
