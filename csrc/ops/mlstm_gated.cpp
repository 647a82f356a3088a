#include "csrc/ops/mlstm_gated.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>

#include <functional>
#include <vector>

#include "csrc/ops/autocast.h"
#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/mlstm_autograd.h"
#include "csrc/ops/products.h"

namespace xlstm::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::string_view kOp = "mlstm_gated";

/// (B,T,NH,D) -> (B*T, NH*D)
Tensor rows_of(const Tensor& x) {
  return x.reshape({x.size(0) * x.size(1), x.size(2) * x.size(3)});
}

/// The columns of weight that q, k and v meet.
std::vector<Tensor> weights_of(const MlstmArguments& a, const Tensor& weight) {
  const int64_t heads = a.q.size(2), qk = heads * a.q.size(3), v = heads * a.v.size(3);
  return weight.split_with_sizes({qk, qk, v}, 1);
}

void check_gates(const MlstmArguments& a, const Tensor& weight, const Tensor& bias) {
  check_devices(kOp, a.q.device(), {{"k", a.k}, {"v", a.v}, {"weight", weight}, {"bias", bias}});
  check_rank(kOp, "q", a.q, 4);
  check_shape(kOp, "k", a.k, a.q.sym_sizes(), "(B,T,NH,DQK)");
  check_rank(kOp, "v", a.v, 4);
  check_shape(kOp, "v", a.v, {a.q.size(0), a.q.size(1), a.q.size(2), a.v.size(3)}, "(B,T,NH,DV)");
  const int64_t heads = a.q.size(2), width = heads * (2 * a.q.size(3) + a.v.size(3));
  check_shape(kOp, "weight", weight, {2 * heads, width}, "(2*NH, NH*(2*DQK+DV))");
  check_shape(kOp, "bias", bias, {2 * heads}, "(2*NH)");
}

/// Sets igate and fgate. weight: in q's dtype.
void compute_gates(MlstmArguments& a, const Tensor& weight, const Tensor& bias) {
  const std::vector<Tensor> weights = weights_of(a, weight);
  const Tensor sum = full_product(rows_of(a.q), weights[0].t());
  sum.add_(full_product(rows_of(a.k), weights[1].t()));
  sum.add_(full_product(rows_of(a.v), weights[2].t()));
  sum.add_(bias);
  const int64_t heads = a.q.size(2);
  const Tensor gates = sum.view({a.q.size(0), a.q.size(1), 2 * heads});
  a.igate = gates.narrow(2, 0, heads);
  a.fgate = gates.narrow(2, heads, heads);
}

class MlstmGated : public torch::autograd::Function<MlstmGated> {
 public:
  /// The tensors of `a` that may have gradients, with what its gates are made from, all of it but the gates, and the final
  /// m, which has no gradient and stays outside the graph, as in mlstm_chunkwise.
  static variable_list forward(AutogradContext* ctx, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor& weight, const Tensor& bias, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, MlstmArguments a,
                               std::reference_wrapper<Tensor> final_m) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor low = weight.to(a.q.scalar_type());
    compute_gates(a, low, bias);
    const auto [h, c, n, m, product] = mlstm_forward_op(a);
    // Not weight itself: it is larger where it was rounded, and mostly made of two gates' rows for this call alone.
    save_mlstm(ctx, a, h, product, {low});
    ctx->saved_data["weight_type"] = weight.scalar_type();
    ctx->saved_data["bias_type"] = bias.scalar_type();
    ctx->set_materialize_grads(false);
    final_m.get() = m;
    return {h, c, n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kInputs = 10;
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined())
      return variable_list(kInputs);
    const SavedMlstm saved = saved_mlstm(ctx);  // before the guards, as in mlstm_chunkwise
    const BelowAutogradUnlessRecording guard;
    const WithoutAutocast no_autocast;
    variable_list result = saved.gradients(grads);
    // (2*NH, B*T): the bias wants sums of neighbours.
    const Tensor gates = at::cat({result[3].flatten(0, 1).t(), result[4].flatten(0, 1).t()});
    const Tensor low = gates.to(saved.in.q.scalar_type());
    add_to_inputs(result, low, saved);
    result[3] = weight_gradient(low, saved.in).to(ctx->saved_data["weight_type"].toScalarType());
    result[4] = gates.sum(1).to(ctx->saved_data["bias_type"].toScalarType());
    result.resize(kInputs);
    return result;
  }

 private:
  /// dq, dk and dv, the first of `grads`, get what comes by way of the gates.
  static void add_to_inputs(variable_list& grads, const Tensor& gates, const SavedMlstm& saved) {
    const std::vector<Tensor> weights = weights_of(saved.in, saved.others[0]);
    for (size_t i = 0; i < weights.size(); ++i) {
      Tensor rows = rows_of(grads[i]);
      // Torch's FLOP counter knows the out variant, not addmm_. It has no derivative; dq, dk and dv refuse theirs anyway.
      {
        const at::AutoDispatchBelowADInplaceOrView guard;
        at::addmm_out(rows, rows, gates.t(), weights[i]);
      }
      grads[i] = rows.view(grads[i].sizes());
    }
  }

  /// (2*NH, NH*(2*DQK+DV)) in full precision.
  static Tensor weight_gradient(const Tensor& gates, const MlstmArguments& in) {
    const int64_t tokens = gates.size(1), width = in.v.size(2) * in.v.size(3);
    const int64_t chunks = product_chunks(tokens, 1, gates.size(0), width);
    const auto in_chunks = [&](const Tensor& rows) {
      return rows.unflatten(0, {chunks, tokens / chunks});
    };
    const Tensor left = full_factor(in_chunks(gates.t()).transpose(1, 2));
    std::vector<Tensor> sums;
    for (const Tensor& x : {in.q, in.k, in.v})
      sums.push_back(full_product(left, in_chunks(rows_of(x))));
    return at::cat(sums, 2).sum(0);
  }
};

/// The arguments as autocast wants them, where it is on.
MlstmArguments cast(MlstmArguments a) {
  const c10::DeviceType device = a.q.device().type();
  if (!autocast_is_on(device)) return a;
  const at::ScalarType low = at::autocast::get_autocast_dtype(device);
  for (Tensor* x : {&a.q, &a.k, &a.v}) *x = at::autocast::cached_cast(low, *x, device);
  for (OptionalTensor* x : {&a.c0, &a.n0, &a.m0})
    if (*x) *x = at::autocast::cached_cast(at::kFloat, **x, device);
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> mlstm_gated(const Tensor& q, const Tensor& k,
                                                       const Tensor& v, const Tensor& weight,
                                                       const Tensor& bias, const OptionalTensor& c0,
                                                       const OptionalTensor& n0,
                                                       const OptionalTensor& m0,
                                                       const MlstmOptions& options) {
  MlstmArguments a = cast({q,
                           k,
                           v,
                           {},
                           {},
                           c0,
                           n0,
                           m0,
                           options.reset,
                           options.cu_seqlens,
                           options.input_gate,
                           options.normalize,
                           options.scale,
                           options.eps,
                           options.chunk_size});
  check_gates(a, weight, bias);
  const WithoutAutocast no_autocast;  // the casts are made by hand; float32 products must stay so
  if (recording(a.q, a.k, a.v, weight, bias, a.c0, a.n0, a.m0)) {
    Tensor m;
    const variable_list out =
        MlstmGated::apply(a.q, a.k, a.v, weight, bias, a.c0, a.n0, a.m0, a, std::ref(m));
    return {out[0], out[1], out[2], m};
  }
  compute_gates(a, weight.to(a.q.scalar_type()), bias);
  return mlstm_chunkwise(a.q, a.k, a.v, a.igate, a.fgate, a.c0, a.n0, a.m0, options);
}

}  // namespace xlstm::ops
