"""All tensors of a call are on one device: every operator, argument by argument."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import libxlstm  # noqa: F401  registers the operators

B, T, NH, D, V, R = 1, 5, 2, 4, 7, 3
ROWS, HEADS, GATES = (B, T, D), (B, T, NH, D), (B, T, NH)
INT, LONG, BOOL = torch.int32, torch.int64, torch.bool
C, N, M = (B, NH, D, D), (B, NH, D), (B, NH)  # one sequence, so that these are the states of packed ones, too
DOCUMENTS = {"reset": (B, T, BOOL), "cu_seqlens": (2, INT)}
RESET = {"reset": (B, T, BOOL)}

MLSTM = {"q": HEADS, "k": HEADS, "v": HEADS, "igate": GATES, "fgate": GATES, "c0": C, "n0": N, "m0": M} | DOCUMENTS
MLSTM_OPTIONS = {"input_gate": "exp", "normalize": True, "scale": None, "eps": 1e-6, "chunk_size": 0}
MLSTM_STEP = {"q": N, "k": N, "v": N, "igate": M, "fgate": M, "c": C, "n": N, "m": M}
STEP_INPUTS = {"x": (B, D), "conv_weight": (D, 3), "conv_bias": (D,)}
for name in "qkv":
    STEP_INPUTS |= {f"{name}_weight": (2, 2, 2), f"{name}_bias": (D,)}
for name in ("igate", "fgate"):
    STEP_INPUTS |= {f"{name}_weight": (NH, 3 * D), f"{name}_bias": (NH,)}
STEP_INPUTS |= {"window": (B, 2, D)}
RING = {"keys": (B, NH, R, D), "values": (B, NH, R, D), "gates": (B, NH, R, 2), "count": (B, NH, INT)}
SLSTM_STATES = {name: N for name in ("y0", "c0", "n0", "m0")} | DOCUMENTS
SLSTM = {"wx": (B, T, 4, NH, D), "r": (4, NH, D, D), "b": (4, NH, D)} | SLSTM_STATES
SLSTM_OPTIONS = {"cell": "slstm", "recurrent_clip": 0.0, "recurrent_cut": False}
CONV = {"x": ROWS, "weight": (D, 3), "bias": (D,), "state0": (B, 2, D)} | DOCUMENTS
NORM = {"x": HEADS, "weight": (NH * D,), "bias": (NH * D,), "skip": (B, T, NH * D), "skip_weight": (NH * D,),
        "gate": (B, T, NH * D)}
ENTROPY = {"x": ROWS, "weight": (V, D), "target": (B, T, LONG)}
ENTROPY_OPTIONS = {"ignore_index": -100, "soft_cap": 0.0, "reduction": "mean"}
WKV = {"k": ROWS, "v": ROWS, "w": (D,), "u": (D,), "a0": (B, D), "b0": (B, D), "p0": (B, D)} | RESET
SCAN = {"x": ROWS, "delta": ROWS, "a": (D, 3), "b": (B, T, 3), "c": (B, T, 3), "skip": (D,), "state0": (B, D, 3)} | RESET
GATED = {"q": HEADS, "k": HEADS, "v": HEADS, "g": HEADS, "u": (NH, D), "state0": C} | RESET

# Sizes of the tensors, with a dtype behind them where it is not float32, and the other arguments that have no default.
OPERATORS = {
    "mlstm_chunkwise": (MLSTM, {}),
    "mlstm_chunkwise_forward": (MLSTM, MLSTM_OPTIONS),
    "mlstm_chunkwise_backward": ({"dh": HEADS, "dc": C, "dn": N, "h": HEADS, "product": GATES} | MLSTM, MLSTM_OPTIONS),
    "mlstm_step": (MLSTM_STEP, {}),
    "mlstm_step_inputs": (STEP_INPUTS, {}),
    "mlstm_step_lazy": (MLSTM_STEP | RING, {}),
    "mlstm_fold": ({"c": C, "n": N, "m": M} | RING, {}),
    "slstm": (SLSTM, {}),
    "slstm_forward": (SLSTM, SLSTM_OPTIONS | {"recompute": False, "preactivations": True}),
    "slstm_backward": ({"dy": HEADS, "dy_last": N, "dc": N, "dn": N, "y": HEADS, "gates": (B, T, 4, NH, D),
                        "checkpoints": (1, NH, 3, D)} | SLSTM, SLSTM_OPTIONS | {"gate_dim": 2}),
    "causal_conv1d": (CONV, {}),
    "causal_conv1d_step": ({"x": (B, D), "weight": (D, 3), "bias": (D,), "state": (B, 2, D)}, {}),
    "causal_conv1d_backward": ({"dy": ROWS, "dstate": (B, 2, D)} | CONV, {"silu": False}),
    "headwise_norm": (NORM, {}),
    "headwise_norm_backward": ({"dy": (B, T, NH * D)} | NORM, {"eps": 1e-5, "kind": "layer", "gate_activation": "silu"}),
    "residual_norm": ({"x": ROWS, "branch": ROWS, "weight": (D,), "bias": (D,)}, {}),
    "residual_norm_backward": ({"dsum": ROWS, "dy": ROWS, "sum": ROWS, "weight": (D,), "bias": (D,)},
                               {"eps": 1e-5, "kind": "layer"}),
    "block_linear": ({"x": ROWS, "weight": (2, 3, 2), "bias": (6,)}, {}),
    "block_linear_backward": ({"dy": (B, T, 6), "x": ROWS, "weight": (2, 3, 2)}, {"has_bias": True}),
    "quantize_int8": ({"weight": (V, D)}, {}),
    "dequantize_int8": ({"weight": (V, 32, torch.int8)}, {"in_features": D}),
    "linear_int8": ({"x": ROWS, "weight": (V, 32, torch.int8), "bias": (V,)}, {}),
    "linear_cross_entropy": (ENTROPY, {}),
    "linear_cross_entropy_forward": (ENTROPY, ENTROPY_OPTIONS | {"need_dx": True, "need_dweight": True}),
    "linear_cross_entropy_backward": ({"grad": ()} | ENTROPY | {"dx": ROWS, "dweight": (V, D)}, ENTROPY_OPTIONS),
    "wkv": (WKV, {}),
    "wkv_backward": ({"dy": ROWS, "da": (B, D), "db": (B, D)} | WKV, {}),
    "selective_scan": (SCAN, {}),
    "selective_scan_backward": ({"dy": ROWS, "dstate": (B, D, 3)} | SCAN, {}),
    "gated_linear_attention": (GATED, {}),
    "gated_linear_attention_backward": ({"dh": HEADS, "dstate": C} | GATED, {"scale": None}),
    "gated_scan": ({"x": ROWS, "a": ROWS, "state0": (B, D)} | RESET, {}),
    "gated_scan_backward": ({"dh": ROWS, "dstate": (B, D), "a": ROWS, "h": ROWS, "state0": (B, D)} | RESET, {}),
}


def tensor(sizes):
    dtype = sizes[-1] if sizes and isinstance(sizes[-1], torch.dtype) else torch.float32
    return torch.zeros([size for size in sizes if isinstance(size, int)], dtype=dtype)


def arguments(operator):
    sizes, options = OPERATORS[operator]
    return {name: tensor(each) for name, each in sizes.items()}, options


def results(out):
    return out if isinstance(out, tuple) else () if out is None else (out,)


@pytest.mark.parametrize("operator", [name for name, (tensors, _) in OPERATORS.items() if len(tensors) > 1])
def test_a_tensor_of_another_device_is_refused(operator):
    """A kernel would take its address for one of its own device, and a Meta kernel would return what nobody has computed."""
    stem = operator.removesuffix("_backward").removesuffix("_forward")
    call = getattr(torch.ops.xlstm, operator)
    tensors, options = arguments(operator)
    for name in tensors:
        given = tensors | {name: tensors[name].to("meta")}
        # Where it is the first one, whose device the others should have, one of these is blamed.
        message = rf"^{stem}(_backward)?: ({name}: expected device cpu, got meta|\w+: expected device meta, got cpu)"
        with pytest.raises(RuntimeError, match=message):
            call(**given, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_of_one_device_are_taken(operator):
    """Meta tensors, fake ones, whose device is that of the tensors they stand for, and calls without what is optional."""
    call = getattr(torch.ops.xlstm, operator)
    tensors, options = arguments(operator)
    schema = {argument.name: argument for argument in call.default._schema.arguments}
    assert {name for name, argument in schema.items() if "Tensor" in str(argument.type)} == tensors.keys()
    required = {name: x for name, x in tensors.items() if "Optional" not in str(schema[name].type)}
    absent = {name: None for name in tensors.keys() - required.keys()}
    for given in (tensors, required | absent):
        meta = {name: x if x is None else x.to("meta") for name, x in given.items()}
        assert all(x.device.type == "meta" for x in results(call(**meta, **options)))
        with FakeTensorMode() as mode:
            fake = {name: x if x is None else mode.from_tensor(x) for name, x in given.items()}
            assert all(x.device.type == "cpu" for x in results(call(**fake, **options)))


def test_every_operator_is_here():
    names = {schema.name.removeprefix("xlstm::") for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith("xlstm::")}
    assert names == OPERATORS.keys()
