// libxlstm._C: models that the C++ programs trained, for Python. The forward pass runs without the interpreter lock;
// autograd works through it, because parameters and results are the same tensors on both sides.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "csrc/config/config.h"
#include "csrc/core/error.h"
#include "csrc/models/language_model.h"
#include "train/checkpoint.h"

namespace {

using xlstm::models::LanguageModel;
using xlstm::models::ModelState;

/// A model with the configuration it was built from.
class PyModel {
 public:
  /// tokenizer: where the tokenizer is that `config` names, which may be the folder's own copy.
  PyModel(std::shared_ptr<LanguageModel> model, xlstm::config::Config config, std::string folder,
          std::string tokenizer)
      : model_(std::move(model)),
        config_(std::move(config)),
        folder_(std::move(folder)),
        tokenizer_(std::move(tokenizer)) {}

  std::pair<at::Tensor, ModelState> forward(const at::Tensor& ids,
                                            const std::optional<ModelState>& state,
                                            const std::optional<at::Tensor>& reset) {
    return model_->forward(ids, state.value_or(ModelState{}), reset);
  }
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& targets,
                  const std::optional<at::Tensor>& reset, const std::string& reduction) {
    return model_->loss(ids, targets, reset, reduction.c_str());
  }
  /// The model's own tensors, not copies, in registration order.
  std::vector<at::Tensor> parameters() const { return model_->parameters(); }
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const {
    std::vector<std::pair<std::string, at::Tensor>> result;
    for (const auto& item : model_->named_parameters())
      result.emplace_back(item.key(), item.value());
    return result;
  }
  /// In place: every reference to a parameter sees it move. Tensors that are no floating-point numbers keep their dtype.
  void to(std::optional<at::Device> device, std::optional<at::ScalarType> dtype) {
    TORCH_CHECK(!dtype || at::isFloatingType(*dtype), "dtype: expected a floating-point one, got ",
                *dtype);
    const at::NoGradGuard no_grad;
    const auto moved = [&](const at::Tensor& tensor) {
      const auto kind =
          tensor.is_floating_point() ? dtype.value_or(tensor.scalar_type()) : tensor.scalar_type();
      return tensor.to(device.value_or(tensor.device()), kind);
    };
    for (const auto& [name, tensor] : xlstm::train::named_model_tensors(*model_)) {
      const at::Tensor data = moved(tensor), gradient = tensor.grad();
      if (data.is_same(tensor)) continue;
      at::Tensor target = tensor;
      if (gradient.defined()) target.mutable_grad() = at::Tensor();
      target.set_data(data);
      if (gradient.defined()) target.mutable_grad() = moved(gradient);
    }
  }
  void save(const std::string& folder) const {
    xlstm::config::Config config = config_;
    config.data.tokenizer = tokenizer_;
    xlstm::train::save_model_folder(folder, config, xlstm::train::named_model_tensors(*model_));
  }
  int64_t num_parameters() const {
    int64_t count = 0;
    for (const auto& parameter : model_->parameters()) count += parameter.numel();
    return count;
  }
  void train(bool on) { model_->train(on); }
  bool training() const { return model_->is_training(); }
  std::string config() const { return xlstm::config::print_config(config_); }
  const std::string& folder() const { return folder_; }
  std::string repr() const {
    const auto& o = model_->options();
    return "<libxlstm model " + o.kind + ": " + std::to_string(o.num_blocks) + " blocks, width " +
           std::to_string(o.embedding_dim) + ", vocabulary " + std::to_string(o.vocab_size) + ", " +
           std::to_string(num_parameters()) + " parameters>";
  }

 private:
  std::shared_ptr<LanguageModel> model_;
  xlstm::config::Config config_;
  std::string folder_, tokenizer_;
};

PyModel load(const std::string& checkpoint_dir, bool verify) {
  auto loaded = xlstm::train::load_model(checkpoint_dir, verify);
  return PyModel(std::move(loaded.model), std::move(loaded.config), std::move(loaded.folder),
                 std::move(loaded.tokenizer));
}

PyModel make_model(const std::string& yaml) {
  auto config = xlstm::config::parse_config(yaml, "<string>");
  auto model = xlstm::models::make_language_model(config.model);
  std::string tokenizer = config.data.tokenizer;
  return PyModel(std::move(model), std::move(config), "", std::move(tokenizer));
}

xlstm::NamedTensors named_tensors(const py::dict& tensors) {
  xlstm::NamedTensors named;
  for (const auto& item : tensors)
    named.emplace_back(item.first.cast<std::string>(), item.second.cast<at::Tensor>());
  return named;
}

void save_model_folder(const std::string& folder, const std::string& yaml,
                       const py::dict& tensors) {
  const xlstm::NamedTensors named = named_tensors(tensors);
  py::gil_scoped_release no_lock;
  xlstm::train::save_model_folder(folder, xlstm::config::parse_config(yaml, "<string>"), named);
}

void save_safetensors(const std::string& path, const py::dict& tensors) {
  const xlstm::NamedTensors named = named_tensors(tensors);
  py::gil_scoped_release no_lock;
  xlstm::save_safetensors(path, named, {{"format", "pt"}});
}

void save_model(const PyModel& self, const py::object& folder) {
  const std::string path = py::str(folder);
  py::gil_scoped_release no_lock;
  self.save(path);
}

/// model.to() as torch has it: a device, a dtype, or both, the device also by name.
PyModel& move_model(PyModel& self, py::object device, py::object dtype) {
  const py::module_ torch = py::module_::import("torch");
  if (py::isinstance(device, torch.attr("dtype"))) {
    if (!dtype.is_none()) throw py::type_error("to(): two dtypes were given");
    std::swap(device, dtype);
  }
  if (!dtype.is_none() && !py::isinstance(dtype, torch.attr("dtype")))
    throw py::type_error("dtype: expected one as torch.bfloat16, got " +
                         py::repr(dtype).cast<std::string>());
  std::optional<at::Device> place;
  if (!device.is_none()) place = torch.attr("device")(device).cast<at::Device>();
  const auto kind = dtype.cast<std::optional<at::ScalarType>>();
  py::gil_scoped_release no_lock;
  self.to(place, kind);
  return self;
}

PyModel& set_training(PyModel& self, bool on) {
  self.train(on);
  return self;
}

/// What copy.deepcopy, torch.save and the like call.
py::object refuse_to_copy(const PyModel&, const py::object&) {
  throw py::type_error(
      "a model is copied and kept by model.save(folder) and libxlstm.load(folder) alone");
}

/// A checkpoint's message is for people; c10::Error would otherwise carry a C++ backtrace.
/// xlstm::Error becomes libxlstm.Error, a RuntimeError with the exit status of the programs as `code`; torch's own
/// errors become what torch makes of them (IndexError, ValueError, RuntimeError, ...).
void register_errors(py::module_& m) {
  static py::handle error = py::exception<xlstm::Error>(m, "Error", PyExc_RuntimeError).release();
  py::register_local_exception_translator([](std::exception_ptr caught) {
    try {
      if (caught) std::rethrow_exception(caught);
    } catch (const xlstm::Error& e) {
      py::object instance = py::reinterpret_borrow<py::object>(error)(e.what());
      instance.attr("code") = static_cast<int>(e.code);
      PyErr_SetObject(error.ptr(), instance.ptr());
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(caught);
    }
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  register_errors(m);
  using no_lock = py::call_guard<py::gil_scoped_release>;
  py::class_<PyModel>(m, "Model",
                      "A language model: model(ids, state=None, reset=None) -> (logits, state).")
      .def("__call__", &PyModel::forward, py::arg("ids"), py::arg("state") = py::none(),
           py::arg("reset") = py::none(), no_lock(),
           "ids (B,T) int64 -> logits (B,T,V) and the state after the last token (one list of "
           "tensors per block).\n"
           "state None: before the first token. reset (B,T) bool: the state is empty before that "
           "token.")
      .def(
          "loss", &PyModel::loss, py::arg("ids"), py::arg("targets"), py::arg("reset") = py::none(),
          py::arg("reduction") = "mean", no_lock(),
          "Cross entropy in nats of the model's predictions; never holds all logits.\n"
          "ids, targets (B,T) int64: targets[b,t] is the token that follows ids[b,t], so both are "
          "slices of one\n"
          "(B,T+1) tensor, x[:, :-1] and x[:, 1:]; nothing is shifted here. Targets of -100 do not "
          "count. reset (B,T)\n"
          "bool: the state is empty before that token. reduction \"mean\": over the targets that "
          "count, a scalar (0 where\n"
          "none does); \"sum\": their sum; \"none\": (B,T), 0 where a target does not count. "
          "Differentiable.\n"
          "A model of numbers (model.input_features with vocab_size 1) takes ids (B,T,F) and "
          "targets (B,T), both float,\n"
          "and gives squared errors; targets of NaN do not count.")
      .def("parameters", &PyModel::parameters,
           "The model's own tensors, as an optimizer takes them.")
      .def("named_parameters", &PyModel::named_parameters,
           "Pairs of name and tensor, as in torch.nn.Module.")
      .def("to", &move_model, py::arg("device") = py::none(), py::arg("dtype") = py::none(),
           "Moves the parameters, in place, to a device, a floating-point dtype, or both; gives "
           "the model.")
      .def("save", &save_model, py::arg("folder"),
           "Writes a checkpoint folder for load() and the programs, tokenizer included.")
      .def("train", &set_training, py::arg("mode") = true, "Dropout on; gives the model.")
      .def(
          "eval", [](PyModel& self) -> PyModel& { return set_training(self, false); },
          "Dropout off; gives the model.")
      .def("__reduce_ex__", &refuse_to_copy)
      .def_property_readonly("training", &PyModel::training)
      .def_property_readonly("num_parameters", &PyModel::num_parameters)
      .def_property_readonly("config", &PyModel::config,
                             "Every setting of the run that made the model, as YAML.")
      .def_property_readonly("folder", &PyModel::folder,
                             "The checkpoint folder, \"\" for a fresh model.")
      .def("__repr__", &PyModel::repr);
  m.def("load", &load, py::arg("checkpoint_dir"), py::arg("verify") = true, no_lock(),
        "The model of a checkpoint folder, or of a run folder (its newest good checkpoint), in "
        "eval mode.");
  m.def("make_model", &make_model, py::arg("yaml"), no_lock(),
        "A freshly initialised model from a YAML text.");
  m.def("save_model_folder", &save_model_folder, py::arg("folder"), py::arg("yaml"),
        py::arg("tensors"), "Writes a model-only checkpoint folder.");
  m.def("save_safetensors", &save_safetensors, py::arg("path"), py::arg("tensors"),
        "Writes tensors by name, one after the other.");
  m.def("config_schema_json", &xlstm::config::config_schema_json, "Every setting as JSON.");
}
