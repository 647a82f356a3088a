#pragma once
// How modules are made from a model's options.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <memory>

#include "csrc/models/model_options.h"

namespace xlstm::models {

/// Throws c10::Error naming the option that is out of its range.
void check_options(const ModelOptions& options);

/// Adapters beside the large linear maps of a model (nn::adapt_linear_maps).
void adapt(torch::nn::Module& model, const ModelOptions::Lora& options);

/// A Module(options, device). What it or its parts refuse are values of the options: c10::ValueError.
template <class Module>
std::shared_ptr<Module> build(const ModelOptions& options, at::Device device) {
  const auto made = [&](at::Device drawn_on) {
    auto module = std::make_shared<Module>(options, drawn_on);
    if (options.lora.rank > 0) adapt(*module, options.lora);
    return module;
  };
  try {  // without memory, so that the lack of it is another error
    check_options(options);
    if (const auto module = made(at::kMeta); device.is_meta()) return module;
  } catch (const c10::Error& error) {
    throw c10::ValueError(error.msg(), error.backtrace());
  }
  const auto module = made(at::kCPU);  // for every device: one seed, one model
  if (!device.is_cpu()) module->to(device);
  return module;
}

}  // namespace xlstm::models
