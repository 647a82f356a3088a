// Whole blocks against the equations of the papers, one token after the other, in plain float64 ATen arithmetic.
#include <map>

#include "tests/nn/blocks.h"
#include "tests/support/catch.h"

namespace xlstm::nn::test {
namespace {

using Parameters = std::map<std::string, at::Tensor>;

Parameters parameters_of(const torch::nn::Module& module) {
  Parameters result;
  for (const auto& item : module.named_parameters()) result[item.key()] = item.value().detach();
  return result;
}

/// (x - mean) / sqrt(var + eps) over groups of the last dimension.
at::Tensor group_norm(const at::Tensor& x, int64_t groups, double eps, bool center = true) {
  const at::Tensor g = x.view({x.size(0), groups, -1});
  const at::Tensor shifted = center ? g - g.mean({-1}, true) : g;
  return (shifted / (shifted * shifted).mean({-1}, true).add(eps).sqrt()).view(x.sizes());
}

/// y[b, block*size + o] = sum_i w[block, o, i] x[b, block*size + i].
at::Tensor blockwise(const at::Tensor& x, const at::Tensor& w) {
  const at::Tensor per_block = x.view({x.size(0), w.size(0), w.size(2)});
  return at::einsum("bni,noi->bno", {per_block, w}).reshape({x.size(0), -1});
}

/// SiLU of the causal convolution at time t; x (B,T,C).
at::Tensor conv_at(const at::Tensor& x, int64_t t, const at::Tensor& w, const at::Tensor& b) {
  at::Tensor sum = b.expand({x.size(0), -1});
  const int64_t width = w.size(1);
  for (int64_t j = 0; j < width; ++j) {
    const int64_t source = t - (width - 1) + j;
    if (source >= 0) sum = sum + w.select(1, j) * x.select(1, source);
  }
  return at::silu(sum);
}

/// Equations 19-27 of arXiv 2405.04517 without a stabiliser: numbers are small here. Keeps C and n.
struct PlainMlstm {
  at::Tensor c, n;
  at::Tensor step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& i, const at::Tensor& f) {
    const at::Tensor forget = at::sigmoid(f), input = at::exp(i);
    const at::Tensor kv = k.unsqueeze(-1) * v.unsqueeze(-2) * input.unsqueeze(-1).unsqueeze(-1);
    c = c.defined() ? forget.unsqueeze(-1).unsqueeze(-1) * c + kv : kv;
    n = n.defined() ? forget.unsqueeze(-1) * n + input.unsqueeze(-1) * k : input.unsqueeze(-1) * k;
    const at::Tensor scaled = q / std::sqrt(static_cast<double>(q.size(-1)));
    const at::Tensor normaliser = (n * scaled).sum({-1}).abs().clamp_min(1.0);
    return (c * scaled.unsqueeze(-1)).sum({-2}) / normaliser.unsqueeze(-1);
  }
};

/// y plus the bias of the projection `name`, where it has one.
at::Tensor biased(const at::Tensor& y, const Parameters& p, const std::string& name) {
  const auto found = p.find(name + ".bias");
  return found == p.end() ? y : y + found->second;
}

at::Tensor heads(const at::Tensor& x, int64_t count) { return x.view({x.size(0), count, -1}); }

/// W x + b, b alone, or the numbers that a gate without parameters has.
at::Tensor gate_of(const at::Tensor& x, const Parameters& p, const std::string& name,
                   const std::vector<double>& fixed) {
  const auto weight = p.find(name + ".weight"), bias = p.find(name + ".bias");
  if (weight != p.end()) return x.mm(weight->second.t()) + bias->second;
  const at::Tensor row = bias != p.end() ? bias->second : at::tensor(fixed, x.options());
  return row.expand({x.size(0), row.size(0)});
}

at::Tensor mlstm_oracle(const at::Tensor& u, Parameters p, const MlstmBlockOptions& o) {
  PlainMlstm cell;
  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> inner;  // x of every token so far
  for (int64_t t = 0; t < u.size(1); ++t) {
    const at::Tensor normed = group_norm(u.select(1, t), 1, o.norm_eps) * p["norm.weight"];
    const at::Tensor up = biased(normed.mm(p["mlstm.proj_up.weight"].t()), p, "mlstm.proj_up");
    inner.push_back(up.narrow(1, 0, o.inner_dim));
    const at::Tensor z = up.narrow(1, o.inner_dim, o.inner_dim);
    const at::Tensor a =
        conv_at(at::stack(inner, 1), t, p["mlstm.conv.weight"], p["mlstm.conv.bias"]);
    const auto project = [&](const at::Tensor& in, const std::string& name) {
      return biased(blockwise(in, p[name + ".weight"]), p, name);
    };
    const at::Tensor q = project(a, "mlstm.q_proj"), k = project(a, "mlstm.k_proj");
    const at::Tensor v = project(inner.back().contiguous(), "mlstm.v_proj");
    const at::Tensor qkv = at::cat({q, k, v}, 1);
    const at::Tensor i = gate_of(qkv, p, "mlstm.igate", {0, 0, 0});
    const at::Tensor f = gate_of(qkv, p, "mlstm.fgate", {3, 4.5, 6});
    const int64_t nh = o.num_heads;
    const at::Tensor h =
        cell.step(heads(q, nh), heads(k, nh), heads(v, nh), i, f).reshape({u.size(0), -1});
    const at::Tensor normed_h = group_norm(h, nh, o.norm_eps) * p["mlstm.out_norm.weight"];
    const at::Tensor gated = (normed_h + p["mlstm.skip"] * a) * at::silu(z);
    outputs.push_back(u.select(1, t) +
                      biased(gated.mm(p["mlstm.proj_down.weight"].t()), p, "mlstm.proj_down"));
  }
  return at::stack(outputs, 1);
}

/// x + down(act(up(norm(x)))), gated by its first half or not.
at::Tensor feed_forward(const at::Tensor& x, const Parameters& p, const FeedForwardOptions& o,
                        double eps) {
  const at::Tensor normed = group_norm(x, 1, eps) * p.at("ffn_norm.weight");
  const at::Tensor up = normed.mm(p.at("ffn.proj_up.weight").t());
  const at::Tensor g = up.narrow(1, 0, o.hidden_dim);
  const at::Tensor act =
      o.act_fn == "relu2" ? g * g * (g > 0) : 0.5 * g * (1 + at::erf(g / std::sqrt(2.0)));
  const at::Tensor hidden = o.gated ? act * up.narrow(1, o.hidden_dim, o.hidden_dim) : act;
  return x + hidden.mm(p.at("ffn.proj_down.weight").t());
}

at::Tensor post_mlstm_oracle(const at::Tensor& u, Parameters p, const MlstmBlockOptions& o) {
  PlainMlstm cell;
  std::vector<at::Tensor> outputs, history;
  const int64_t nh = o.num_heads;
  for (int64_t t = 0; t < u.size(1); ++t) {
    const at::Tensor x = group_norm(u.select(1, t), 1, o.norm_eps) * p["norm.weight"];
    history.push_back(x);
    const at::Tensor a =
        o.conv_kernel_size == 0
            ? x
            : conv_at(at::stack(history, 1), t, p["mlstm.conv.weight"], p["mlstm.conv.bias"]);
    const auto project = [&](const at::Tensor& in, const std::string& name) {
      return in.mm(p["mlstm." + name + ".weight"].t());
    };
    const at::Tensor h =
        cell.step(heads(project(a, "q_proj"), nh), heads(project(a, "k_proj"), nh),
                  heads(project(x, "v_proj"), nh), gate_of(x, p, "mlstm.igate", {0, 0, 0}),
                  gate_of(x, p, "mlstm.fgate", {1e3, 1e3, 1e3}));
    const at::Tensor normed =
        group_norm(h.reshape({u.size(0), -1}), nh, o.norm_eps) * p["mlstm.out_norm.weight"];
    const at::Tensor y = project(normed * at::sigmoid(project(x, "ogate")), "proj_down");
    outputs.push_back(feed_forward(u.select(1, t) + y, p, squared_relu_options(), o.norm_eps));
  }
  return at::stack(outputs, 1);
}

at::Tensor slstm_oracle(const at::Tensor& u, Parameters p, const SlstmBlockOptions& o) {
  const int64_t nh = o.num_heads, batch = u.size(0);
  at::Tensor y = at::zeros({batch, kDim}, u.options()), c = y.clone(), n = y.clone();
  std::vector<at::Tensor> outputs, history;
  const at::Tensor bias = p["slstm.bias"].reshape({4, kDim}), recurrent = p["slstm.recurrent"];
  for (int64_t t = 0; t < u.size(1); ++t) {
    const at::Tensor x = group_norm(u.select(1, t), 1, o.norm_eps) * p["norm.weight"];
    history.push_back(x);
    const at::Tensor a =
        conv_at(at::stack(history, 1), t, p["slstm.conv.weight"], p["slstm.conv.bias"]);
    std::vector<at::Tensor> gate;
    const char* names[] = {"slstm.igate.weight", "slstm.fgate.weight", "slstm.zgate.weight",
                           "slstm.ogate.weight"};
    for (int64_t g = 0; g < 4; ++g) {
      gate.push_back(blockwise(g < 2 ? a : x, p[names[g]]) + blockwise(y, recurrent[g]) + bias[g]);
    }
    const at::Tensor input = at::exp(gate[0]), forget = at::sigmoid(gate[1]);
    c = forget * c + input * at::tanh(gate[2]);
    n = forget * n + input;
    y = at::sigmoid(gate[3]) * c / n;
    const at::Tensor mixed =
        u.select(1, t) + group_norm(y, nh, o.norm_eps) * p["slstm.out_norm.weight"];
    outputs.push_back(feed_forward(mixed, p, o.feed_forward, o.norm_eps));
  }
  return at::stack(outputs, 1);
}

at::Tensor large_oracle(const at::Tensor& u, Parameters p, const XlstmLargeBlockOptions& o) {
  const auto project = [&](const at::Tensor& x, const std::string& name) {
    return x.mm(p["mlstm_layer." + name + ".weight"].t());
  };
  const auto capped_gate = [&](const at::Tensor& x, const std::string& name) {
    return o.gate_soft_cap *
           at::tanh((project(x, name) + p["mlstm_layer." + name + ".bias"]) / o.gate_soft_cap);
  };
  PlainMlstm cell;
  std::vector<at::Tensor> outputs;
  const int64_t nh = o.num_heads;
  for (int64_t t = 0; t < u.size(1); ++t) {
    const at::Tensor token = u.select(1, t);
    const at::Tensor x = group_norm(token, 1, o.norm_eps, false) * p["norm_mlstm.weight"];
    const at::Tensor h = cell.step(heads(project(x, "q"), nh), heads(project(x, "k"), nh),
                                   heads(project(x, "v"), nh), capped_gate(x, "igate_preact"),
                                   capped_gate(x, "fgate_preact"));
    const at::Tensor normed = group_norm(h.reshape({u.size(0), -1}), nh, o.norm_eps) *
                              p["mlstm_layer.multihead_norm.weight"];
    const at::Tensor mixed =
        token + project(at::sigmoid(project(x, "ogate_preact")) * normed, "out_proj");
    const at::Tensor m = group_norm(mixed, 1, o.norm_eps, false) * p["norm_ffn.weight"];
    const at::Tensor up =
        at::silu(m.mm(p["ffn.proj_up_gate.weight"].t())) * m.mm(p["ffn.proj_up.weight"].t());
    outputs.push_back(mixed + up.mm(p["ffn.proj_down.weight"].t()));
  }
  return at::stack(outputs, 1);
}

template <class BlockType, class Options, class Oracle>
void compare(const Options& options, const Oracle& oracle) {
  const NamedBlock made = named_block<BlockType>("", options);
  for (const int64_t batch : {2, 4}) {  // few tokens and many are computed in different ways
    const at::Tensor x = random_input(batch, 10);
    CHECK(difference(made.block->forward(x, {}, {}).first,
                     oracle(x, parameters_of(*made.block), options)) < 1e-10);
  }
}

TEST_CASE("blocks equal the papers' equations") {
  torch::manual_seed(6);
  at::NoGradGuard no_grad;
  SECTION("mLSTM") { compare<MlstmBlock>(mlstm_options(), mlstm_oracle); }
  SECTION("mLSTM with biases") {
    auto options = mlstm_options();
    options.bias = true;
    compare<MlstmBlock>(options, mlstm_oracle);
  }
  SECTION("mLSTM whose gates do not read the input") {
    auto options = mlstm_options();
    for (const char* source : {"input", "bias", "fixed"}) {
      options.igate = {"bias", "normal"}, options.fgate = {source, "linspace"};
      compare<MlstmBlock>(options, mlstm_oracle);
      options.igate = {"fixed", "zeros"};
      compare<MlstmBlock>(options, mlstm_oracle);
    }
    options.igate = {"input", "normal"}, options.fgate = {"fixed", "linspace"};
    compare<MlstmBlock>(options, mlstm_oracle);
  }
  SECTION("mLSTM with post-up-projection") {
    auto options = mlstm_options();
    compare<PostBlock>(options, post_mlstm_oracle);
    options.conv_kernel_size = 0;
    options.igate = {"fixed", "zeros"}, options.fgate = {"fixed", "open"};
    compare<PostBlock>(options, post_mlstm_oracle);
  }
  SECTION("sLSTM") { compare<SlstmBlock>(slstm_options(), slstm_oracle); }
  SECTION("sLSTM with dense gates and a feed-forward without gate") {
    auto options = slstm_options();
    options.gate_proj = "dense";
    options.feed_forward = squared_relu_options();
    compare<SlstmBlock>(options, slstm_oracle);
  }
  SECTION("7B") { compare<XlstmLargeBlock>(large_options(), large_oracle); }
}

}  // namespace
}  // namespace xlstm::nn::test
