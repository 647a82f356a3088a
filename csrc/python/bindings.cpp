// libxlstm._C: models that the C++ programs trained, for Python. The forward pass runs without the interpreter lock;
// autograd works through it, because parameters and results are the same tensors on both sides.
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
  PyModel(std::shared_ptr<LanguageModel> model, xlstm::config::Config config, std::string folder)
      : model_(std::move(model)), config_(std::move(config)), folder_(std::move(folder)) {}

  std::pair<at::Tensor, ModelState> forward(const at::Tensor& ids,
                                            const std::optional<ModelState>& state,
                                            const std::optional<at::Tensor>& reset) {
    return model_->forward(ids, state.value_or(ModelState{}), reset);
  }
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& targets,
                  const std::optional<at::Tensor>& reset, const std::string& reduction) {
    return model_->loss(ids, targets, reset, reduction.c_str());
  }
  /// Parameters by dotted name, in registration order: the model's own tensors, not copies.
  py::dict parameters() const {
    py::dict result;
    for (const auto& item : model_->named_parameters()) result[py::str(item.key())] = item.value();
    return result;
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
  std::string folder_;
};

PyModel load(const std::string& checkpoint_dir, bool verify) {
  auto loaded = xlstm::train::load_model(checkpoint_dir, verify);
  return PyModel(std::move(loaded.model), std::move(loaded.config), std::move(loaded.folder));
}

PyModel make_model(const std::string& yaml) {
  auto config = xlstm::config::parse_config(yaml, "<string>");
  auto model = xlstm::models::make_language_model(config.model);
  return PyModel(std::move(model), std::move(config), "");
}

/// A checkpoint's message is for people; c10::Error would otherwise carry a C++ backtrace.
void save_model_folder(const std::string& folder, const std::string& yaml,
                       const py::dict& tensors) {
  xlstm::NamedTensors named;
  for (const auto& item : tensors)
    named.emplace_back(item.first.cast<std::string>(), item.second.cast<at::Tensor>());
  py::gil_scoped_release no_lock;
  xlstm::train::save_model_folder(folder, xlstm::config::parse_config(yaml, "<string>"), named);
}

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
      .def("loss", &PyModel::loss, py::arg("ids"), py::arg("targets"),
           py::arg("reset") = py::none(), py::arg("reduction") = "mean", no_lock(),
           "Cross entropy in nats; targets of -100 do not count.")
      .def("parameters", &PyModel::parameters,
           "Parameters by name; they share storage with the model.")
      .def("train", &PyModel::train, py::arg("mode") = true)
      .def("eval", [](PyModel& self) { self.train(false); })
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
  m.def("config_schema_json", &xlstm::config::config_schema_json, "Every setting as JSON.");
}
