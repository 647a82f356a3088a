// libxlstm._C: models that the C++ programs trained, for Python, where libxlstm/model.py makes torch.nn.Modules of them.
// The forward pass runs without the interpreter lock; autograd works through it, because parameters and results are the
// same tensors on both sides.
#include <ATen/ops/from_blob.h>
#include <pybind11/numpy.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>
#include <optional>
#include <span>
#include <system_error>
#include <tuple>

#include "csrc/config/config.h"
#include "csrc/core/error.h"
#include "csrc/data/dataset.h"
#include "csrc/data/token_writer.h"
#include "csrc/data/tokenizer.h"
#include "csrc/models/language_model.h"
#include "csrc/nn/layers.h"
#include "train/checkpoint.h"
#include "train/generation.h"

namespace {

using xlstm::models::BlockOutputs;
using xlstm::models::BlockStack;
using xlstm::models::LanguageModel;
using xlstm::models::ModelState;

/// The module's own tensors, not copies, in registration order.
std::vector<std::pair<std::string, at::Tensor>> named_parameters(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (const auto& item : module.named_parameters()) result.emplace_back(item.key(), item.value());
  return result;
}

const ModelState kNoState;

/// Vectors behind the last norm, the state, and vectors behind the blocks that were asked for.
using Vectors = std::tuple<at::Tensor, ModelState, std::vector<at::Tensor>>;

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

  /// With targets the loss in place of the logits.
  std::pair<at::Tensor, ModelState> forward(const at::Tensor& ids,
                                            const std::optional<ModelState>& state,
                                            const std::optional<at::Tensor>& reset,
                                            const std::optional<at::Tensor>& lengths,
                                            const std::optional<at::Tensor>& targets,
                                            const std::string& reduction) {
    const ModelState& given = state ? *state : kNoState;
    if (!targets) return model_->forward(ids, given, reset, lengths);
    return model_->loss_and_state(ids, *targets, given, reset, reduction.c_str(), lengths);
  }
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& targets,
                  const std::optional<at::Tensor>& reset, const std::string& reduction) {
    return model_->loss(ids, targets, reset, reduction.c_str());
  }
  Vectors hidden(bool embedded, const at::Tensor& inputs, const std::optional<ModelState>& state,
                 const std::optional<at::Tensor>& reset, const std::optional<at::Tensor>& lengths,
                 std::vector<int64_t> blocks) {
    BlockOutputs outputs{std::move(blocks), {}};
    auto [y, next] = model_->hidden(inputs, state ? *state : kNoState, reset, lengths, embedded,
                                    outputs.blocks.empty() ? nullptr : &outputs);
    return {std::move(y), std::move(next), std::move(outputs.vectors)};
  }
  /// What was drawn, and with a state, which may be empty, the one behind it. on_token(i, id). Holds the interpreter lock only
  /// while it looks for Ctrl-C and tells a token.
  std::pair<std::vector<std::vector<int64_t>>, std::optional<ModelState>> generate(
      const std::vector<std::vector<int64_t>>& prompts,
      const xlstm::train::SamplingOptions& options, const py::object& on_token,
      std::optional<ModelState> state) {
    const py::gil_scoped_release no_lock;
    auto generated = xlstm::train::generate_batch(
        *model_, prompts, options,
        [&](size_t i, int64_t id) {
          const py::gil_scoped_acquire lock;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          if (!on_token.is_none()) on_token(i, id);
        },
        state ? &*state : nullptr);
    return {std::move(generated), std::move(state)};
  }
  /// Checkpoints hold float32, or what it can take in: float64 is rounded.
  /// tokenizer: as the constructor takes it.
  void save(const std::string& folder, const std::string& tokenizer) const {
    xlstm::config::Config config = config_;
    config.data.tokenizer = tokenizer;
    xlstm::NamedTensors tensors = xlstm::train::named_model_tensors(*model_);
    for (auto& [name, tensor] : tensors)
      if (tensor.scalar_type() == at::kDouble) tensor = tensor.detach().to(at::kFloat);
    xlstm::train::save_model_folder(folder, config, tensors,
                                    xlstm::train::read_tokenizer(tokenizer));
  }
  /// What undrawn() takes.
  std::tuple<std::string, std::string, std::string> settings() const {
    return {config(), folder_, tokenizer_};
  }
  /// For the caller to fill in the parameters, some of which hold anything.
  static PyModel undrawn(const std::string& yaml, std::string folder, std::string tokenizer) {
    auto config = xlstm::config::parse_config(yaml, "<settings>");
    const xlstm::nn::SkipDrawing skip_drawing;
    auto model = xlstm::models::make_language_model(config.model);
    return PyModel(std::move(model), std::move(config), std::move(folder), std::move(tokenizer));
  }
  PyModel merged() const {
    xlstm::config::Config config = config_;
    config.model.lora = {};
    return PyModel(xlstm::models::merge_lora(*model_), std::move(config), folder_, tokenizer_);
  }
  LanguageModel& module() const { return *model_; }
  std::string config() const { return xlstm::config::print_config(config_); }
  const std::string& folder() const { return folder_; }
  /// Where the tokenizer is; "" where there is none: the model is of a task, or of ids of the caller's own.
  std::string tokenizer() const {
    const bool own_ids = folder_.empty() && tokenizer_ == "bytes";
    return own_ids || xlstm::data::is_given(config_.data.task) ? "" : tokenizer_;
  }

 private:
  std::shared_ptr<LanguageModel> model_;
  xlstm::config::Config config_;
  std::string folder_, tokenizer_;
};

/// Blocks alone.
class PyStack {
 public:
  explicit PyStack(const xlstm::models::ModelOptions& options)
      : stack_(xlstm::models::make_block_stack(options)) {}

  Vectors forward(const at::Tensor& x, const std::optional<ModelState>& state,
                  const std::optional<at::Tensor>& reset, const std::optional<at::Tensor>& lengths,
                  std::vector<int64_t> blocks) {
    BlockOutputs outputs{std::move(blocks), {}};
    auto [y, next] = stack_->forward(x, state ? *state : kNoState, reset, lengths,
                                     outputs.blocks.empty() ? nullptr : &outputs);
    return {std::move(y), std::move(next), std::move(outputs.vectors)};
  }
  std::tuple<std::string> settings() const {
    xlstm::config::Config config;
    config.model = stack_->options();
    return {xlstm::config::print_config(config)};
  }
  static PyStack undrawn(const std::string& yaml) {
    const xlstm::nn::SkipDrawing skip_drawing;
    return PyStack(xlstm::config::parse_config(yaml, "<settings>").model);
  }
  BlockStack& module() const { return *stack_; }

 private:
  std::shared_ptr<BlockStack> stack_;
};

/// What CoreModule in Python asks of both.
template <class Py>
py::class_<Py> define(py::module_& m, const char* name, const char* doc) {
  using no_lock = py::call_guard<py::gil_scoped_release>;
  return py::class_<Py>(m, name, doc)
      .def("__call__", &Py::forward, no_lock())
      .def("named_parameters", [](const Py& self) { return named_parameters(self.module()); })
      .def("settings", &Py::settings)
      .def_static("undrawn", &Py::undrawn, no_lock())
      .def(
          "train", [](const Py& self, bool mode) { self.module().train(mode); }, py::arg("mode"))
      .def(
          "quantize", [](const Py& self) { xlstm::nn::round_weights(self.module(), at::kChar); },
          no_lock())
      .def_property_readonly("training", [](const Py& self) { return self.module().is_training(); })
      .def("describe", [](const Py& self) {
        const auto& o = self.module().options();
        return o.kind + ": " + std::to_string(o.num_blocks) + " blocks, width " +
               std::to_string(o.embedding_dim);
      });
}

/// Token files as the trainer reads them.
class PyTokenData {
 public:
  PyTokenData(const std::vector<std::string>& prefixes, const std::vector<double>& weights,
              const xlstm::data::DatasetOptions& options)
      : files_(open(prefixes, weights)), dataset_(files_, options) {}

  std::tuple<at::Tensor, at::Tensor, at::Tensor> batch(int64_t first_sample, int64_t count) const {
    xlstm::data::Batch batch = dataset_.batch(first_sample, count);
    const std::vector<int64_t> shape{batch.batch_size, batch.seq_len};
    return {at::from_blob(batch.input.data(), shape, at::kLong).clone(),
            at::from_blob(batch.target.data(), shape, at::kLong).clone(),
            at::from_blob(batch.reset.data(), shape, at::kByte).to(at::kBool)};
  }
  int64_t samples_per_epoch() const { return dataset_.samples_per_epoch(); }
  int64_t num_tokens() const {
    int64_t total = 0;
    for (const auto& [file, weight] : files_) total += file->num_tokens();
    return total;
  }
  int64_t num_counted_tokens() const {
    int64_t total = 0;
    for (const auto& [file, weight] : files_) total += file->num_counted_tokens();
    return total;
  }
  std::optional<int64_t> vocab_size() const {
    int64_t largest = 0;
    for (const auto& [file, weight] : files_) {
      if (!file->sidecar()) return std::nullopt;
      largest = std::max(largest, file->sidecar()->vocab_size);
    }
    return largest;
  }

 private:
  static std::vector<xlstm::data::WeightedFile> open(const std::vector<std::string>& prefixes,
                                                     const std::vector<double>& weights) {
    std::vector<xlstm::data::WeightedFile> files;
    for (size_t i = 0; i < prefixes.size(); ++i)
      files.push_back({std::make_shared<const xlstm::data::TokenFile>(prefixes[i]), weights.at(i)});
    return files;
  }
  std::vector<xlstm::data::WeightedFile> files_;
  xlstm::data::Dataset dataset_;
};

/// A token file under construction; without finish() nothing of it is left.
class PyTokenWriter {
 public:
  template <typename T>
  using Array = py::array_t<T, py::array::c_style>;
  PyTokenWriter(const std::string& name, int64_t vocab_size, bool overwrite)
      : writer_(free_prefix(name, overwrite), vocab_size) {}
  /// ids (T), and whether each counts in the loss (T)
  void append(const Array<int64_t>& ids, const Array<bool>& counted) {
    const std::span<const int64_t> all(ids.data(), static_cast<size_t>(ids.size()));
    const std::span<const bool> counts(counted.data(), static_cast<size_t>(counted.size()));
    if (all.size() != counts.size()) throw py::value_error("as many of counted as of ids expected");
    const py::gil_scoped_release no_lock;
    for (size_t first = 0; first < all.size();) {  // run by run
      const auto end = std::find(counts.begin() + first, counts.end(), !counts[first]);
      const auto size = static_cast<size_t>(end - counts.begin()) - first;
      writer_.append(&all[first], static_cast<int64_t>(size), counts[first]);
      first += size;
    }
  }
  void end_document() { writer_.end_document(); }
  void finish(const std::string& tokenizer, int64_t eos_id, int64_t num_bytes,
              int64_t num_counted_bytes, const std::string& command) {
    xlstm::data::Sidecar sidecar;
    sidecar.tokenizer = tokenizer;
    sidecar.tokenizer_sha256 = xlstm::data::tokenizer_sha256(tokenizer);
    sidecar.eos_id = eos_id;
    sidecar.num_bytes = num_bytes;
    sidecar.num_counted_bytes = num_counted_bytes;
    sidecar.source_documents = {{"ids", writer_.num_documents()}};
    sidecar.command = command;
    writer_.finish(std::move(sidecar));
  }
  int64_t num_tokens() const { return writer_.num_tokens(); }
  int64_t num_counted_tokens() const { return writer_.num_counted_tokens(); }
  int64_t num_documents() const { return writer_.num_documents(); }

 private:
  static std::string free_prefix(const std::string& name, bool overwrite) {
    std::string prefix = xlstm::data::output_prefix(name);
    if (!overwrite) xlstm::data::check_replaceable(prefix, {});
    return prefix;
  }
  xlstm::data::TokenWriter writer_;
};

/// make(), where what modules refuse of their settings is an Error, as what the configuration refuses.
template <class Make>
auto built(const Make& make) {
  try {
    return make();
  } catch (const c10::ValueError& error) {
    throw xlstm::Error(xlstm::ExitCode::kConfig, error.msg());
  }
}

PyModel load(const std::string& checkpoint_dir, bool verify, at::ScalarType dtype,
             const std::vector<std::string>& overrides) {
  auto loaded =
      built([&] { return xlstm::train::load_model(checkpoint_dir, verify, dtype, overrides); });
  return PyModel(std::move(loaded.model), std::move(loaded.config), std::move(loaded.folder),
                 std::move(loaded.tokenizer));
}

/// settings: a YAML text, or the path of a file.
PyModel make_model(const std::string& settings, bool is_file) {
  auto config = is_file ? xlstm::config::load_config(settings)
                        : xlstm::config::parse_config(settings, "<string>");
  auto model = built([&] { return xlstm::models::make_language_model(config.model); });
  std::string tokenizer = config.data.tokenizer;
  return PyModel(std::move(model), std::move(config), "", std::move(tokenizer));
}

PyStack make_stack(const std::string& yaml) {
  const auto config = xlstm::config::parse_config(yaml, "<arguments>");
  return built([&] { return PyStack(config.model); });
}

xlstm::NamedTensors named_tensors(const py::dict& tensors) {
  xlstm::NamedTensors named;
  for (const auto& item : tensors)
    named.emplace_back(item.first.cast<std::string>(), item.second.cast<at::Tensor>());
  return named;
}

std::map<std::string, py::bytes> read_tokenizer(const std::string& spec) {
  std::map<std::string, py::bytes> files;
  for (const auto& [name, content] : xlstm::train::read_tokenizer(spec)) files[name] = content;
  return files;
}

void save_model_folder(const std::string& folder, const std::string& yaml, const py::dict& tensors,
                       const std::optional<std::map<std::string, std::string>>& tokenizer) {
  const xlstm::NamedTensors named = named_tensors(tensors);
  py::gil_scoped_release no_lock;
  const auto config = xlstm::config::parse_config(yaml, "<string>");
  xlstm::train::TokenizerFiles files;
  if (tokenizer) {
    files.assign(tokenizer->begin(), tokenizer->end());
  } else {
    files = xlstm::train::read_tokenizer(config.data.tokenizer);
  }
  xlstm::train::save_model_folder(folder, config, named, files);
}

void save_safetensors(const std::string& path, const py::dict& tensors) {
  const xlstm::NamedTensors named = named_tensors(tensors);
  py::gil_scoped_release no_lock;
  xlstm::save_safetensors(path, named, {{"format", "pt"}});
}

/// A checkpoint's message is for people; c10::Error would otherwise carry a C++ backtrace.
/// xlstm::Error becomes libxlstm.Error, a RuntimeError with the exit status of the programs as `code`; torch's own
/// errors become what torch makes of them (IndexError, ValueError, RuntimeError, ...).
void register_errors(py::module_& m) {
  static py::handle error = py::exception<xlstm::Error>(m, "Error", PyExc_RuntimeError).release();
  static const auto set_error = [](const char* what, xlstm::ExitCode code) {
    py::object instance = py::reinterpret_borrow<py::object>(error)(what);
    instance.attr("code") = static_cast<int>(code);
    PyErr_SetObject(error.ptr(), instance.ptr());
  };
  py::register_local_exception_translator([](std::exception_ptr caught) {
    try {
      if (caught) std::rethrow_exception(caught);
    } catch (const xlstm::Error& e) {
      set_error(e.what(), e.code);
    } catch (const std::system_error& e) {  // of files
      set_error(e.what(), xlstm::ExitCode::kCheckpoint);
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(caught);
    }
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  register_errors(m);
  using no_lock = py::call_guard<py::gil_scoped_release>;
  define<PyModel>(m, "Model", "What a libxlstm.Model stands for, and is documented there.")
      .def("loss", &PyModel::loss, no_lock())
      .def("hidden", &PyModel::hidden, no_lock())
      .def(
          "embed",
          [](const PyModel& self, const at::Tensor& ids) { return self.module().embed(ids); },
          no_lock())
      .def(
          "logits",
          [](const PyModel& self, const at::Tensor& h) { return self.module().logits(h); },
          no_lock())
      .def("merge_lora", &PyModel::merged, no_lock())
      .def_property_readonly("tokenizer", &PyModel::tokenizer)
      .def(
          "generate",
          [](PyModel& self, const std::vector<std::vector<int64_t>>& prompts,
             int64_t max_new_tokens, double temperature, int64_t top_k, double top_p, uint64_t seed,
             int64_t stop_token, int64_t vocab_size, const py::object& on_token,
             std::optional<ModelState> state) {
            return self.generate(prompts,
                                 {.max_new_tokens = max_new_tokens,
                                  .temperature = temperature,
                                  .top_k = top_k,
                                  .top_p = top_p,
                                  .seed = seed,
                                  .stop_token = stop_token,
                                  .vocab_size = vocab_size},
                                 on_token, std::move(state));
          },
          py::arg("prompts"), py::arg("max_new_tokens"), py::arg("temperature"), py::arg("top_k"),
          py::arg("top_p"), py::arg("seed"), py::arg("stop_token"), py::arg("vocab_size"),
          py::arg("on_token"), py::arg("state"))
      .def("save", &PyModel::save, py::arg("folder"), py::arg("tokenizer"), no_lock())
      .def_property_readonly("config", &PyModel::config)
      .def_property_readonly("folder", &PyModel::folder);
  define<PyStack>(m, "BlockStack",
                  "What a libxlstm.BlockStack stands for, and is documented there.");
  py::class_<PyTokenData>(m, "TokenData",
                          "What a libxlstm.TokenData stands for, and is documented there.")
      .def(py::init([](const std::vector<std::string>& prefixes, const std::vector<double>& weights,
                       int64_t seq_len, uint64_t seed, bool shuffle, int64_t streams,
                       bool reset_state_at_document, bool mask_loss_across_documents) {
             return PyTokenData(prefixes, weights,
                                {.seq_len = seq_len,
                                 .shuffle = shuffle,
                                 .seed = seed,
                                 .reset_state_at_document = reset_state_at_document,
                                 .mask_loss_across_documents = mask_loss_across_documents,
                                 .streams = streams});
           }),
           py::arg("prefixes"), py::arg("weights"), py::arg("seq_len"), py::arg("seed"),
           py::arg("shuffle"), py::arg("streams"), py::arg("reset_state_at_document"),
           py::arg("mask_loss_across_documents"), no_lock())
      .def("batch", &PyTokenData::batch, py::arg("first_sample"), py::arg("count"), no_lock())
      .def_property_readonly("samples_per_epoch", &PyTokenData::samples_per_epoch)
      .def_property_readonly("num_tokens", &PyTokenData::num_tokens)
      .def_property_readonly("num_counted_tokens", &PyTokenData::num_counted_tokens)
      .def_property_readonly("vocab_size", &PyTokenData::vocab_size);
  py::class_<PyTokenWriter>(m, "TokenWriter",
                            "What a libxlstm.TokenWriter writes by, which is documented there.")
      .def(py::init<const std::string&, int64_t, bool>(), py::arg("prefix"), py::arg("vocab_size"),
           py::arg("overwrite"))
      .def("append", &PyTokenWriter::append, py::arg("ids"), py::arg("counted"))
      .def("end_document", &PyTokenWriter::end_document)
      .def("finish", &PyTokenWriter::finish, py::arg("tokenizer"), py::arg("eos_id"),
           py::arg("num_bytes"), py::arg("num_counted_bytes"), py::arg("command"), no_lock())
      .def_property_readonly("num_tokens", &PyTokenWriter::num_tokens)
      .def_property_readonly("num_counted_tokens", &PyTokenWriter::num_counted_tokens)
      .def_property_readonly("num_documents", &PyTokenWriter::num_documents);
  m.def("load", &load, py::arg("checkpoint_dir"), py::arg("verify"), py::arg("dtype"),
        py::arg("overrides"), no_lock(),
        "The model of a checkpoint folder, or of a run folder (its newest good checkpoint), in "
        "eval mode.");
  m.def("make_model", &make_model, py::arg("settings"), py::arg("is_file"), no_lock(),
        "A freshly initialised model from a YAML text or file.");
  m.def("make_stack", &make_stack, py::arg("yaml"), no_lock(),
        "Freshly initialised blocks from the settings `model` of a YAML text.");
  m.def("decays", &xlstm::models::decays, py::arg("name"), py::arg("parameter"),
        py::arg("of_embedding"), "Whether weight decay is usual for a parameter.");
  m.def("read_tokenizer", &read_tokenizer, py::arg("spec"),
        "The files of a tokenizer and what belongs to it, as a checkpoint holds them.");
  m.def("save_model_folder", &save_model_folder, py::arg("folder"), py::arg("yaml"),
        py::arg("tensors"), py::arg("tokenizer") = py::none(),
        "Writes a model-only checkpoint folder. tokenizer: what read_tokenizer gives, else that of "
        "the settings.");
  m.def("save_safetensors", &save_safetensors, py::arg("path"), py::arg("tensors"),
        "Writes tensors by name, one after the other.");
  m.def("config_schema_json", &xlstm::config::config_schema_json, "Every setting as JSON.");
}
