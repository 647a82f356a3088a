// The only place with schema strings. Kernels are registered beside their code: *_cpu.cpp, *_cuda.cpp, *_autograd.cpp
// (Autograd, Autocast and Meta).
#include <torch/library.h>

TORCH_LIBRARY(xlstm, m) {
  m.set_python_module("libxlstm");
  m.def(
      "mlstm_chunkwise(Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate, Tensor? c0=None, "
      "Tensor? n0=None, "
      "Tensor? m0=None, *, Tensor? reset=None, Tensor? cu_seqlens=None, str input_gate=\"exp\", "
      "bool normalize=True, "
      "float? scale=None, float eps=1e-6, int chunk_size=0) -> (Tensor h, Tensor c, Tensor n, "
      "Tensor m)");
  // For the backward pass: product (B,T,NH) is scale q . n of every token, in the states' dtype; its content is
  // unspecified with normalize=False.
  m.def(
      "mlstm_chunkwise_forward(Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate, Tensor? "
      "c0, Tensor? n0, Tensor? m0, *, Tensor? reset, Tensor? cu_seqlens, str input_gate, bool "
      "normalize, float? scale, float eps, int chunk_size) -> (Tensor h, Tensor c, Tensor n, "
      "Tensor m, Tensor product)");
  m.def(
      "mlstm_chunkwise_backward(Tensor? dh, Tensor? dc, Tensor? dn, Tensor q, Tensor k, Tensor v, "
      "Tensor igate, "
      "Tensor fgate, Tensor? c0, Tensor? n0, Tensor? m0, Tensor h, Tensor product, *, Tensor? "
      "reset, Tensor? cu_seqlens, "
      "str input_gate, bool normalize, float? scale, float eps, int chunk_size) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor digate, Tensor dfgate, Tensor dc0, Tensor dn0)");
  m.def(
      "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate, Tensor(a!) c, "
      "Tensor(b!) n, Tensor(c!) m, "
      "*, str input_gate=\"exp\", bool normalize=True, float? scale=None, float eps=1e-6) -> "
      "Tensor h");
  m.def(
      "mlstm_step_inputs(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor q_weight, Tensor? "
      "q_bias, Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias, Tensor "
      "igate_weight, Tensor igate_bias, Tensor fgate_weight, Tensor fgate_bias, Tensor(a!) window) "
      "-> (Tensor a, Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate)");
  m.def(
      "mlstm_step_lazy(Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate, Tensor(a!) c, "
      "Tensor(b!) n, Tensor(c!) m, Tensor(d!) keys, Tensor(e!) values, Tensor(f!) gates, "
      "Tensor(g!) count, *, str input_gate=\"exp\", bool normalize=True, float? scale=None, float "
      "eps=1e-6) -> Tensor h");
  m.def(
      "mlstm_fold(Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, Tensor keys, Tensor values, Tensor "
      "gates, Tensor(d!) count, *, str input_gate=\"exp\") -> ()");
  m.def(
      "slstm(Tensor wx, Tensor r, Tensor b, Tensor? y0=None, Tensor? c0=None, Tensor? n0=None, "
      "Tensor? m0=None, *, Tensor? reset=None, Tensor? cu_seqlens=None, str cell=\"slstm\", "
      "bool recompute=False, float recurrent_clip=0., bool recurrent_cut=False) "
      "-> (Tensor y, Tensor y_last, Tensor c, Tensor n, Tensor m)");
  // preactivations: what gates and checkpoints hold, csrc/ops/slstm_arguments.h; False on the CPU, True elsewhere.
  m.def(
      "slstm_forward(Tensor wx, Tensor r, Tensor b, Tensor? y0, Tensor? c0, Tensor? n0, Tensor? "
      "m0, *, Tensor? reset, Tensor? cu_seqlens, str cell, bool recompute, float recurrent_clip, "
      "bool recurrent_cut, bool preactivations) -> (Tensor y, Tensor y_last, Tensor c, Tensor n, "
      "Tensor m, Tensor "
      "gates, Tensor checkpoints)");
  // wx and b: where the gates are computed again; gates has no elements then.
  m.def(
      "slstm_backward(Tensor? dy, Tensor? dy_last, Tensor? dc, Tensor? dn, Tensor y, Tensor gates, "
      "Tensor checkpoints, Tensor? wx, Tensor r, Tensor? b, Tensor? y0, Tensor? c0, Tensor? n0, "
      "Tensor? m0, *, Tensor? reset, Tensor? cu_seqlens, str cell, float recurrent_clip, bool "
      "recurrent_cut, int gate_dim) "
      "-> (Tensor dwx, Tensor dr, Tensor db, Tensor dy0, Tensor dc0, Tensor dn0)");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? state0=None, *, Tensor? "
      "reset=None, "
      "Tensor? cu_seqlens=None, bool silu=False) -> (Tensor y, Tensor state)");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, *, bool "
      "silu=False) -> Tensor y");
  m.def(
      "causal_conv1d_backward(Tensor? dy, Tensor? dstate, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? state0, *, "
      "Tensor? reset, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate0)");
  m.def(
      "headwise_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, Tensor? skip=None, Tensor? "
      "skip_weight=None, "
      "Tensor? gate=None, *, float eps=1e-5, str kind=\"layer\", str gate_activation=\"silu\") -> "
      "Tensor");
  m.def(
      "headwise_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? skip, "
      "Tensor? skip_weight, "
      "Tensor? gate, *, float eps, str kind, str gate_activation) -> (Tensor dx, Tensor dweight, "
      "Tensor dbias, "
      "Tensor dskip, Tensor dskip_weight, Tensor dgate)");
  m.def(
      "residual_norm(Tensor x, Tensor branch, Tensor? weight=None, Tensor? bias=None, *, float "
      "eps=1e-5, str kind=\"layer\") -> (Tensor sum, Tensor y)");
  // dsum: what reaches the sum past the norm. dx is the gradient of x and of branch, in sum's dtype.
  m.def(
      "residual_norm_backward(Tensor? dsum, Tensor dy, Tensor sum, Tensor? weight, Tensor? bias, "
      "*, float eps, str kind) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("block_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "block_linear_backward(Tensor dy, Tensor x, Tensor weight, *, bool has_bias) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, *, int ignore_index=-100, "
      "float soft_cap=0., "
      "str reduction=\"mean\") -> Tensor");
  m.def(
      "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor target, *, int ignore_index, "
      "float soft_cap, "
      "str reduction, bool need_dx, bool need_dweight) -> (Tensor loss, Tensor dx, Tensor "
      "dweight)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor? "
      "dx, Tensor? dweight, "
      "*, int ignore_index, float soft_cap, str reduction) -> (Tensor dx, Tensor dweight)");
  m.def("quantize_int8(Tensor weight) -> Tensor");
  m.def("dequantize_int8(Tensor weight, SymInt in_features, *, ScalarType dtype=float) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  // Of the models that xLSTM is compared with.
  m.def(
      "wkv(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? a0=None, Tensor? b0=None, Tensor? "
      "p0=None, *, Tensor? reset=None) -> (Tensor y, Tensor a, Tensor b, Tensor p)");
  m.def(
      "wkv_backward(Tensor? dy, Tensor? da, Tensor? db, Tensor k, Tensor v, Tensor w, Tensor u, "
      "Tensor? a0, Tensor? b0, Tensor? p0, *, Tensor? reset) "
      "-> (Tensor dk, Tensor dv, Tensor dw, Tensor du, Tensor da0, Tensor db0)");
  m.def(
      "selective_scan(Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor skip, Tensor? "
      "state0=None, *, Tensor? reset=None) -> (Tensor y, Tensor state)");
  m.def(
      "selective_scan_backward(Tensor? dy, Tensor? dstate, Tensor x, Tensor delta, Tensor a, "
      "Tensor "
      "b, Tensor c, Tensor skip, Tensor? state0, *, Tensor? reset) -> (Tensor dx, Tensor ddelta, "
      "Tensor da, Tensor db, Tensor dc, Tensor dskip, Tensor dstate0)");
  m.def(
      "gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? u=None, Tensor? "
      "state0=None, *, Tensor? reset=None, float? scale=None, int chunk_size=0) -> (Tensor h, "
      "Tensor state)");
  m.def(
      "gated_linear_attention_backward(Tensor? dh, Tensor? dstate, Tensor q, Tensor k, Tensor v, "
      "Tensor g, Tensor? u, Tensor? state0, *, Tensor? reset, float? scale, int chunk_size=0) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor du, Tensor dstate0)");
  m.def(
      "gated_scan(Tensor x, Tensor a, Tensor? state0=None, *, Tensor? reset=None) -> (Tensor h, "
      "Tensor state)");
  m.def(
      "gated_scan_backward(Tensor? dh, Tensor? dstate, Tensor a, Tensor h, Tensor? state0, *, "
      "Tensor? reset) -> (Tensor dx, Tensor da, Tensor dstate0)");
}
