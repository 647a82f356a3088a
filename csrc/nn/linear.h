#pragma once
// Linear maps, and what may become of those of a trained model: matrices of 8 bits to run it, adapters to train it further.
#include <torch/nn/module.h>

#include <string>

namespace xlstm::nn {

/// y = x weight^T + bias; weight (out,in), bias (out). The weight starts at zero: the owner initialises it. While a
/// SkipDrawing lives its memory is not touched.
class Linear : public torch::nn::Module {
 public:
  Linear(int64_t in_features, int64_t out_features, bool with_bias, at::Device device);
  at::Tensor forward(const at::Tensor& x) const;
  /// Whether most of a model's weights are in such maps, with 64 channels or more on both sides: these are adapted, and their
  /// weights may be kept in 8 bits. Of the others that would save little, and gates are exponentiated.
  bool is_large() const;
  /// A matrix of 8 bits (ops::quantize_int8) becomes the weight, which nothing trains from then on.
  void take_int8(const at::Tensor& matrix);
  bool fits_int8(const at::Tensor& matrix) const;
  /// Rounds the weight, which nothing trains from then on, to a floating dtype or with kChar to 8 bits; while a SkipDrawing
  /// lives the latter are zeros. With adapters beside it forward() computes in x's dtype, or in autocast's, all the same, and
  /// what is converted for that is not kept for the backward pass.
  void keep_in(at::ScalarType dtype);
  int64_t in_features() const { return in_features_; }
  /// The weight (out,in) in a floating dtype, whatever it is kept in.
  at::Tensor weight_as(at::ScalarType dtype) const;
  /// y gains (alpha / rank) B A x (LoRA, arXiv 2106.09685): lora_a = A (rank,in), uniform up to 1 / sqrt(in) as in the
  /// authors' code, lora_b = B (out,rank) zero. Both stay in the dtype they have now when round_weights rounds the rest.
  void adapt(int64_t rank, double alpha);
  /// Draws lora_a as adapt() does where no SkipDrawing lives.
  void draw_adapter();
  /// A weight of its own (out,in) for the same map without adapters, in the wider of both dtypes; without any the weight's copy.
  at::Tensor merged_weight() const;
  at::Tensor weight, bias;    ///< bias undefined when absent
  at::Tensor lora_a, lora_b;  ///< undefined without adapters
  bool stays_plain =
      false;  ///< neither adapted nor in 8 bits: of gates, and where others than forward() read the weight

 private:
  at::Tensor frozen_map(const at::Tensor& x) const;
  const int64_t in_features_;
  double lora_scale_ = 0;
};

/// Rounds the weights of a model or of parts in place, to a floating dtype or with kChar the matrices of its large linear
/// maps to 8 bits and the rest to bfloat16. What has 8 bits keeps them, what keep_in() made half precision is not widened, and
/// adapters stay as they are.
void round_weights(torch::nn::Module& model, at::ScalarType dtype);

/// Whether a parameter of this name is one of an adapter.
bool is_adapter(const std::string& name);

/// Adapts the large linear maps of a model (Linear::adapt) and keeps their weights in `base` (Linear::keep_in); no other
/// parameter needs a gradient from then on. Throws c10::Error where there are none.
void adapt_linear_maps(torch::nn::Module& model, int64_t rank, double alpha, at::ScalarType base);

}  // namespace xlstm::nn
