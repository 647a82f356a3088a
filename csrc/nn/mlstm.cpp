#include "csrc/nn/mlstm.h"

#include <ATen/OpMathType.h>

#include "csrc/ops/autocast.h"
#include "csrc/ops/block_linear.h"
#include "csrc/ops/mlstm_gated.h"

namespace xlstm::nn {
namespace {

constexpr int64_t kManyTokens = 32;   // from here on gates are computed from the inputs of q, k, v
constexpr size_t kStates = 3;         // c, n, m
constexpr size_t kLaggingStates = 7;  // and an ops::MlstmRing

ops::MlstmOptions operator_options(const MlstmCellOptions& options) {
  ops::MlstmOptions op;
  op.input_gate = options.input_gate;
  op.normalize = options.normalize;
  op.eps = options.eps;
  op.chunk_size = options.chunk_size;
  op.scale = options.scale;
  return op;
}

ops::MlstmRing ring_of(const State& cell) { return {cell[3], cell[4], cell[5], cell[6]}; }

/// c, n and m up to date; the given state stays as it is.
State folded(const State& cell, const ops::MlstmOptions& op) {
  State next;
  for (size_t i = 0; i < kStates; ++i) next.push_back(cell[i].clone());
  ops::MlstmRing ring = ring_of(cell);
  ring.count = ring.count.clone();
  ops::mlstm_fold(next[0], next[1], next[2], ring, op);
  return next;
}

/// h (B,NH,DV) of one token; writes to the state.
at::Tensor step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& igate, const at::Tensor& fgate, State& cell,
                const ops::MlstmOptions& op) {
  if (cell.size() == kStates)
    return ops::mlstm_step(q, k, v, igate, fgate, cell[0], cell[1], cell[2], op);
  ops::MlstmRing ring = ring_of(cell);
  return ops::mlstm_step_lazy(q, k, v, igate, fgate, cell[0], cell[1], cell[2], ring, op);
}

/// mlstm_cell of a sequence, whose gates read (q, k, v), in one operator.
Result gated_cell(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const HeadGate& igate, const HeadGate& fgate, const State& cell,
                  const std::optional<at::Tensor>& reset, const MlstmCellOptions& options) {
  ops::MlstmOptions op = operator_options(options);
  const State start = cell.size() == kLaggingStates ? folded(cell, op) : cell;
  op.reset = reset;
  at::Tensor h;
  State next(kStates);
  std::tie(h, next[0], next[1], next[2]) = ops::mlstm_gated(
      q, k, v, at::cat({igate.weight, fgate.weight}), at::cat({igate.bias, fgate.bias}),
      optional_state(start, 0), optional_state(start, 1), optional_state(start, 2), op);
  return {h, next};
}

}  // namespace

HeadGate::HeadGate(int64_t in_features, int64_t num_heads, const HeadGateOptions& options,
                   at::Device device)
    : options_(options), num_heads_(num_heads) {
  const auto parameters = at::TensorOptions().dtype(at::kFloat).device(device);
  TORCH_CHECK(options.source == "input" || options.source == "bias" || options.source == "fixed",
              "gate: source: expected \"input\", \"bias\" or \"fixed\", got \"", options.source,
              "\"");
  TORCH_CHECK(options.source != "fixed" || options.bias_init != "normal",
              "gate: bias_init: \"normal\" is drawn, which a fixed gate would have to remember");
  if (options.source == "input")
    weight = register_parameter("weight", at::zeros({num_heads, in_features}, parameters));
  if (options.source != "fixed")
    bias = register_parameter("bias", at::zeros({num_heads}, parameters));
}

void HeadGate::init() {
  const std::string& how = options_.bias_init;
  TORCH_CHECK(how == "normal" || how == "zeros" || how == "linspace" || how == "open",
              "gate: bias_init: expected \"normal\", \"zeros\", \"linspace\" or \"open\", got \"",
              how, "\"");
  if (!bias.defined() || bias.is_meta()) return;
  const at::NoGradGuard no_grad;
  if (how == "normal") normal_init_(bias, 0.1);
  if (how == "linspace") linspace_init_(bias, 3, 6);
  if (how == "open") bias.fill_(kOpenGate);
}

at::Tensor HeadGate::forward(const at::Tensor& x) const {
  if (reads_input()) return at::linear(x, weight, bias);
  const auto type = at::toOpMathType(x.scalar_type());
  const auto options = at::TensorOptions().dtype(type).device(x.device());
  at::Tensor row = bias;
  if (!row.defined() && options_.bias_init == "linspace")
    row = at::linspace(3, 6, num_heads_, options);
  if (!row.defined())
    row = at::full({num_heads_}, options_.bias_init == "open" ? kOpenGate : 0, options);
  return row.expand({x.size(0), x.size(1), num_heads_});
}

Result mlstm_cell(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& igate, const at::Tensor& fgate, const State& cell,
                  const std::optional<at::Tensor>& reset, const MlstmCellOptions& options) {
  ops::MlstmOptions op = operator_options(options);
  const bool decodes = is_decode_step(q, reset);
  const InPlaceStateGuard* guard = InPlaceStateGuard::current();
  const bool lags = cell.size() == kLaggingStates;
  if (lags && !(decodes && guard != nullptr))
    return mlstm_cell(q, k, v, igate, fgate, folded(cell, op), reset, options);

  at::Tensor h;
  State next;
  if (decodes && !cell.empty()) {
    for (const at::Tensor& state : cell) next.push_back(writable_state(state));
    h = step(q.select(1, 0), k.select(1, 0), v.select(1, 0), igate.select(1, 0), fgate.select(1, 0),
             next, op)
            .unsqueeze(1);
  } else {
    op.reset = reset;
    next.resize(kStates);
    std::tie(h, next[0], next[1], next[2]) =
        ops::mlstm_chunkwise(q, k, v, igate, fgate, optional_state(cell, 0),
                             optional_state(cell, 1), optional_state(cell, 2), op);
  }
  if (decodes && !lags && guard != nullptr) {
    const at::Tensor key = k.select(1, 0), value = v.select(1, 0);
    if (guard->lazy_fold().value_or(ops::mlstm_step_lazy_pays(key, value))) {
      const ops::MlstmRing ring = ops::empty_mlstm_ring(key, value);
      next.insert(next.end(), {ring.keys, ring.values, ring.gates, ring.count});
    }
  }
  return {h, next};
}

void check_mlstm_state(const State& state, size_t others, const char* who) {
  const bool lags = state.size() == kLaggingStates + others;
  check_state(state, (lags ? kLaggingStates : kStates) + others, who);
}

MlstmLayer::MlstmLayer(const MlstmBlockOptions& options, at::Device device) : options_(options) {
  const int64_t inner = options.inner_dim, heads = options.num_heads;
  TORCH_CHECK(inner % heads == 0, "num_heads: expected a divisor of the mLSTM's inner width ",
              inner, ", got ", heads);
  TORCH_CHECK(options.qkv_block_size > 0 && inner % options.qkv_block_size == 0,
              "mlstm.qkv_proj_blocksize: expected a divisor of the mLSTM's inner width ", inner,
              ", got ", options.qkv_block_size);
  const int64_t blocks = inner / options.qkv_block_size;
  proj_up_ = register_module(
      "proj_up", std::make_shared<Linear>(options.dim, 2 * inner, options.bias, device));
  if (options.conv_kernel_size > 0) {
    conv_ = register_module("conv", std::make_shared<CausalConv1d>(inner, options.conv_kernel_size,
                                                                   options.fused, device));
  }
  q_proj_ =
      register_module("q_proj", std::make_shared<BlockLinear>(inner, blocks, options.bias, device));
  k_proj_ =
      register_module("k_proj", std::make_shared<BlockLinear>(inner, blocks, options.bias, device));
  v_proj_ =
      register_module("v_proj", std::make_shared<BlockLinear>(inner, blocks, options.bias, device));
  igate_ =
      register_module("igate", std::make_shared<HeadGate>(3 * inner, heads, options.igate, device));
  fgate_ =
      register_module("fgate", std::make_shared<HeadGate>(3 * inner, heads, options.fgate, device));
  out_norm_ =
      register_module("out_norm", std::make_shared<Norm>(inner, options.norm_eps, "layer", device));
  skip_ = register_parameter(
      "skip", at::ones({inner}, at::TensorOptions().dtype(at::kFloat).device(device)));
  proj_down_ = register_module("proj_down",
                               std::make_shared<Linear>(inner, options.dim, options.bias, device));

  small_init_(proj_up_->weight, options.dim);
  for (auto& proj : {q_proj_, k_proj_, v_proj_}) small_init_(proj->weight, options.dim);
  wang_init_(proj_down_->weight, options.dim, options.num_blocks);
  for (auto& gate : {fgate_, igate_}) gate->init();
}

std::pair<at::Tensor, at::Tensor> MlstmLayer::gates(const at::Tensor& a, const at::Tensor& x,
                                                    const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& v) const {
  if (!igate_->reads_input() || !fgate_->reads_input()) {
    const bool reads = igate_->reads_input() || fgate_->reads_input();
    const at::Tensor qkv = reads ? at::cat({q, k, v}, -1) : x;
    return {igate_->forward(qkv), fgate_->forward(qkv)};
  }
  const int64_t tokens = x.size(0) * x.size(1);
  // A few tokens: as written. Under autocast too: the pre-activations are then rounded once.
  if (!options_.fused || tokens < kManyTokens || ops::autocast_is_on(x.device().type())) {
    return gate_pair(at::cat({q, k, v}, -1), *igate_, *fgate_);
  }
  // q, k and v are small linear maps of a and x. Applied to the gates' few rows of weights instead of to the tokens,
  // they leave two products instead of one three times as wide, and no gradient to add to those of q, k and v.
  const auto rows = at::cat({igate_->weight, fgate_->weight}).chunk(3, 1);
  const auto through = [](const at::Tensor& gate_rows, const BlockLinear& proj) {
    return ops::block_linear(gate_rows, proj.weight.transpose(1, 2));
  };
  at::Tensor bias = at::cat({igate_->bias, fgate_->bias});
  if (options_.bias) {
    bias = bias + rows[0].mv(q_proj_->bias) + rows[1].mv(k_proj_->bias) + rows[2].mv(v_proj_->bias);
  }
  const at::Tensor of_a = through(rows[0], *q_proj_) + through(rows[1], *k_proj_);
  const at::Tensor sum = at::addmm(at::addmm(bias, a.flatten(0, 1), of_a.t()), x.flatten(0, 1),
                                   through(rows[2], *v_proj_).t());
  const auto parts = sum.view({x.size(0), x.size(1), 2 * options_.num_heads}).chunk(2, -1);
  return {parts[0], parts[1]};
}

bool MlstmLayer::gates_join_cell(const at::Tensor& q,
                                 const std::optional<at::Tensor>& reset) const {
  return options_.fused && igate_->reads_input() && fgate_->reads_input() &&
         !is_decode_step(q, reset) && (q.is_cuda() || ops::autocast_is_on(q.device().type()));
}

bool MlstmLayer::inputs_are_a_step(const at::Tensor& x, const at::Tensor& window,
                                   const std::optional<at::Tensor>& reset) const {
  return options_.fused && conv_ && window.defined() && is_decode_step(x, reset) &&
         q_proj_->weight.size(0) > 1 && igate_->reads_input() && fgate_->reads_input() &&
         !ops::autocast_is_on(x.device().type());
}

ops::MlstmInputParameters MlstmLayer::input_parameters() const {
  return {conv_->weight,   given(conv_->bias),   q_proj_->weight, given(q_proj_->bias),
          k_proj_->weight, given(k_proj_->bias), v_proj_->weight, given(v_proj_->bias),
          igate_->weight,  igate_->bias,         fgate_->weight,  fgate_->bias};
}

MlstmLayer::CellInputs MlstmLayer::cell_inputs(const at::Tensor& x, const at::Tensor& window,
                                               const std::optional<at::Tensor>& reset) const {
  if (inputs_are_a_step(x, window, reset)) {
    at::Tensor next = writable_state(window);
    const auto [a, q, k, v, igate, fgate] =
        ops::mlstm_step_inputs(x.select(1, 0), input_parameters(), next);
    return {a.unsqueeze(1),
            q.unsqueeze(1),
            k.unsqueeze(1),
            v.unsqueeze(1),
            igate.unsqueeze(1),
            fgate.unsqueeze(1),
            next};
  }
  const auto [a, next] = convolved(conv_, x, window, reset);
  const at::Tensor q = q_proj_->forward(a), k = k_proj_->forward(a), v = v_proj_->forward(x);
  if (gates_join_cell(q, reset)) return {a, q, k, v, {}, {}, next};
  const auto [igate, fgate] = gates(a, x, q, k, v);
  return {a, q, k, v, igate, fgate, next};
}

Result MlstmLayer::forward(const at::Tensor& x, const State& state,
                           const std::optional<at::Tensor>& reset) {
  check_mlstm_state(state, 1, "mLSTM layer");
  const int64_t batch = x.size(0), length = x.size(1), heads = options_.num_heads;
  const auto halves = proj_up_->forward(x).chunk(2, -1);  // views: the operators take their strides
  const at::Tensor &inner = halves[0], &z = halves[1];
  const auto [a, q, k, v, igate, fgate, window] = cell_inputs(inner, state_at(state, 0), reset);

  const auto by_head = [&](const at::Tensor& y) {
    return y.view({batch, length, heads, options_.inner_dim / heads});
  };
  const State cell = state.empty() ? State{} : State(state.begin() + 1, state.end());
  const MlstmCellOptions cell_options{options_.input_gate, options_.normalize, options_.mlstm_eps,
                                      options_.chunk_size};
  auto [h, next] = igate.defined() ? mlstm_cell(by_head(q), by_head(k), by_head(v), igate, fgate,
                                                cell, reset, cell_options)
                                   : gated_cell(by_head(q), by_head(k), by_head(v), *igate_,
                                                *fgate_, cell, reset, cell_options);
  const at::Tensor gated = gated_norm(
      h, out_norm_->weight, {}, z, {options_.norm_eps, "layer", "silu", options_.fused}, a, skip_);
  const at::Tensor y = apply_dropout(proj_down_->forward(gated), options_.dropout, is_training());
  next.insert(next.begin(), window);
  return {y, std::move(next)};
}

MlstmBlock::MlstmBlock(const MlstmBlockOptions& options, at::Device device) {
  norm_ = register_module("norm",
                          std::make_shared<Norm>(options.dim, options.norm_eps, "layer", device));
  mlstm_ = register_module("mlstm", std::make_shared<MlstmLayer>(options, device));
}

State MlstmBlock::advance(Residual& x, const State& state, const std::optional<at::Tensor>& reset) {
  auto [y, next] = mlstm_->forward(x.normed(*norm_), state, reset);
  x.add(y);
  return std::move(next);
}

}  // namespace xlstm::nn
