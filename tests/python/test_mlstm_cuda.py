"""torch.ops.xlstm.mlstm_* on a GPU, against the same operators in float64 on the CPU. Skipped without one."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_mlstm_step_inputs as step_inputs
import torch
from cuda_paths import generic_path
from test_mlstm_lazy import make_ring

import libxlstm  # noqa: F401  registers the operators

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
import gpu_ops  # noqa: E402

# Whether calls may take the kernels for sm_90a.
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and os.environ.get("XLSTM_HOPPER") != "0"

chunkwise = torch.ops.xlstm.mlstm_chunkwise
forward = torch.ops.xlstm.mlstm_chunkwise_forward
backward = torch.ops.xlstm.mlstm_chunkwise_backward
step = torch.ops.xlstm.mlstm_step
lazy = torch.ops.xlstm.mlstm_step_lazy
fold = torch.ops.xlstm.mlstm_fold
KEYWORDS = {"reset": None, "cu_seqlens": None, "input_gate": "exp", "normalize": True, "scale": None, "eps": 1e-6}
KEYWORDS["chunk_size"] = 0
HEADS = [(16, 16), (24, 40), (64, 64), (64, 128), (128, 128), (128, 256), (256, 512), (384, 384)]
LARGE_HEADS = [(512, 512), (768, 768), (1024, 1024), (1280, 1280)]
TIMES = [1, 17, 63, 64, 65, 127, 200]
# Relative errors in norm. float64 runs on the generic path.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
NAMES = ("h", "c", "n", "m", "dq", "dk", "dv", "digate", "dfgate", "dc0", "dn0")


def make(batch, time, heads, dqk, dv, dtype, *, gate_dtype=None, states=None, seed=0):
    """q, k, v, igate, fgate on the GPU, and c0, n0, m0 for `states` sequences (None: none)."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *sizes: torch.randn(*sizes, generator=g, dtype=torch.float64)  # noqa: E731
    gate_dtype, state = gate_dtype or dtype, torch.promote_types(dtype, torch.float32)
    shape = (batch, time, heads)
    tensors = [random(*shape, dqk), random(*shape, dqk), random(*shape, dv)]
    gates = [random(*shape) * 2 - 1, random(*shape) * 2 + 3]
    inputs = [x.to("cuda", dtype) for x in tensors] + [x.to("cuda", gate_dtype) for x in gates]
    given = []
    if states is not None:
        given = [random(states, heads, dqk, dv), random(states, heads, dqk), random(states, heads)]
    return inputs, [x.to("cuda", state) for x in given]


def run(inputs, states, weights, **options):
    """Outputs and gradients; weights: of h and, with states, of c and n."""
    leaves = [x.detach().requires_grad_() for x in [*inputs, *states[:2]]]
    given = [*leaves[5:], states[2]] if states else []
    h, c, n, m = chunkwise(*leaves[:5], *given, **options)
    outputs = [h, c, n] if states else [h]
    gradients = torch.autograd.grad(outputs, leaves, [w.to(o) for w, o in zip(weights, outputs)])
    return [h, c, n, m, *gradients]


def relative_error(x, reference):
    reference = reference.double().cpu()
    difference = x.detach().double().cpu() - reference
    assert torch.isfinite(difference).all()
    return (difference.norm() / reference.norm().clamp_min(1e-6)).item()


def check(inputs, states, **options):
    """The GPU against float64 on the CPU, from the same rounded inputs."""
    g = torch.Generator().manual_seed(7)
    shapes = [inputs[2].shape, *[x.shape for x in states[:2]]]
    weights = [torch.randn(s, generator=g, dtype=torch.float64).to(inputs[0].dtype) for s in shapes]
    exact = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    dtype = inputs[0].dtype
    wide, wide_states = ([x.double().cpu() for x in group] for group in (inputs, states))
    reference = run(wide, wide_states, weights, **exact)
    moved = None
    for name, x, y in zip(NAMES, run(inputs, states, weights, **options), reference):
        limit = 2 * TOLERANCE[dtype] if name == "dfgate" else TOLERANCE[dtype]
        if name == "m":  # an exponent: absolute
            assert (x.double().cpu() - y).abs().max() <= 1e-4
            continue
        error = relative_error(x, y)
        if error > limit and dtype != torch.float64:
            moved = moved or gpu_ops.movements(wide, wide_states, weights, dtype,
                                               lambda *given: dict(zip(NAMES, run(*given, **exact))))
            limit = gpu_ops.largest_error(name, limit, moved[name])
        assert error <= limit, name


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("time", TIMES)
def test_equals_float64(time, sizes, dtype):
    inputs, states = make(2, time, 2, *sizes, dtype, states=2 if time % 2 else None)
    check(inputs, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", LARGE_HEADS)
def test_large_heads(sizes, dtype):
    for time in (1, 17, 65):
        check(*make(1, time, 1, *sizes, dtype, states=1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", [("exp", True), ("sigmoid", True), ("sigmoid", False)])
@pytest.mark.parametrize("sizes", [(64, 128), (256, 256)])
def test_gates_and_normaliser(sizes, gate, dtype):
    check(*make(2, 130, 3, *sizes, dtype, states=2), input_gate=gate[0], normalize=gate[1])


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gate_dtypes(gate_dtype):
    check(*make(2, 100, 2, 64, 64, torch.bfloat16, gate_dtype=gate_dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(64, 128), (256, 256)])
def test_resets(sizes, dtype):
    reset = torch.zeros(2, 200, dtype=torch.bool, device="cuda")
    reset[0, [0, 1, 63, 64, 65, 128, 199]] = True
    reset[1, [17, 127, 192]] = True
    check(*make(2, 200, 2, *sizes, dtype, states=2), reset=reset)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(64, 128), (256, 256)])
def test_packed_sequences(sizes, dtype):
    cu_seqlens = torch.tensor([0, 0, 1, 64, 128, 192, 193, 193, 300], dtype=torch.int32, device="cuda")
    inputs, states = make(1, 300, 2, *sizes, dtype, states=8)
    check(inputs, states, cu_seqlens=cu_seqlens)
    check(inputs, [], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 64])
def test_long_sequences(batch, dtype):
    check(*make(batch, 3000 if batch == 1 else 300, 2, 64, 64, dtype, states=batch))


@pytest.mark.parametrize("chunk", [0, 64, 128, 256])
def test_chunk_size_changes_nothing(chunk):
    for sizes in ((64, 64), (256, 256)):
        check(*make(1, 300, 2, *sizes, torch.bfloat16, states=1), chunk_size=chunk)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strided_inputs(dtype):
    inputs, states = make(2, 70, 4, 32, 64, dtype, states=2)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    spread = [torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0] for x in inputs]
    packed = torch.cat(inputs[:3], -1)
    parts = [*packed.split([32, 32, 64], -1), *inputs[3:]]
    expected = chunkwise(*inputs, *states)
    if not HOPPER:  # the kernels for sm_90a take aligned rows alone, others the rest
        for other in (moved, spread, parts):
            for x, y in zip(chunkwise(*other, *states), expected):
                assert torch.equal(x, y)
    check(moved, states)
    check(spread, states)
    check(parts, [torch.stack([x, x], -1)[..., 0] for x in states])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 5, 2, 8, 8), (2, 0, 2, 8, 8), (2, 5, 0, 8, 8), (2, 5, 2, 8, 0)])
def test_zero_sizes(sizes, dtype):
    batch, time, heads, dqk, dv = sizes
    inputs, states = make(batch, time, heads, dqk, dv, dtype, states=batch)
    for given in ([], states):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = chunkwise(*leaves, *given)
        expected = chunkwise(*[x.cpu() for x in inputs], *[x.cpu() for x in given])
        for x, y in zip(out, expected):
            torch.testing.assert_close(x.detach().cpu(), y, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(out[0].sum() + out[1].sum() + out[2].sum(), leaves)
        assert all(torch.isfinite(x).all() for x in gradients)


def test_float32_is_never_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        inputs, states = make(2, 200, 2, 128, 128, torch.float32, states=2)
        check(inputs, states)
        with generic_path():
            check(inputs, states)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(24, 40), (128, 256), (384, 384)])
def test_kernels_and_generic_path_agree(sizes, dtype):
    inputs, states = make(2, 200, 2, *sizes, dtype, states=2)
    weights = [torch.ones_like(inputs[2]), *[torch.ones_like(x) for x in states[:2]]]
    ours = run(inputs, states, weights)
    with generic_path():
        generic = run(inputs, states, weights)
        check(inputs, states)
    wide = [[x.double().cpu() for x in group] for group in (inputs, states, weights)]
    moved = gpu_ops.movements(*wide, dtype, lambda *given: dict(zip(NAMES, run(*given))))
    for name, x, y in zip(NAMES, ours, generic):
        assert relative_error(x, y) <= 2 * gpu_ops.largest_error(name, TOLERANCE[dtype], moved[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_are_equal_to_the_bit(dtype):
    inputs, states = make(2, 300, 2, 128, 256, dtype, states=2)
    weights = [torch.ones_like(inputs[2]), *[torch.ones_like(x) for x in states[:2]]]
    first = run(inputs, states, weights)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(run(inputs, states, weights), first))


# ---- step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(16, 16), (24, 40), (128, 256), (384, 384)])
def test_step_repeated_equals_chunkwise(sizes, dtype):
    inputs, states = make(2, 20, 3, *sizes, dtype, states=2)
    exact = chunkwise(*[x.double().cpu() for x in inputs], *[x.double().cpu() for x in states])
    state = [x.clone() for x in states]
    state[0] = state[0].transpose(2, 3).contiguous().transpose(2, 3)  # written in place all the same
    h = torch.stack([step(*[x[:, t] for x in inputs], *state) for t in range(20)], 1)
    assert relative_error(h, exact[0]) <= TOLERANCE[dtype]
    for x, y in zip(state, exact[1:]):
        assert relative_error(x, y) <= min(TOLERANCE[dtype], 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(16, 16), (33, 70), (128, 256), (384, 384)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 20])  # 20: more than the kernels take
@pytest.mark.parametrize("gate", [("exp", True), ("sigmoid", True), ("sigmoid", False)])
def test_lazy_step_repeated_equals_chunkwise(sizes, dtype, tokens, gate):
    inputs, state = make(2, 40, 3, *sizes, dtype, states=2)
    options = {"input_gate": gate[0], "normalize": gate[1]}
    exact = chunkwise(*[x.double().cpu() for x in inputs], *[x.double().cpu() for x in state], **options)
    ring = make_ring(*inputs[1:3], tokens, fill=float("nan"))
    with no_synchronisation():
        h = [lazy(*[x[:, t] for x in inputs], *state, *ring, **options) for t in range(40)]
        fold(*state, *ring, input_gate=gate[0])
    assert relative_error(torch.stack(h, 1), exact[0]) <= TOLERANCE[dtype]
    for x, y in zip(state, exact[1:]):
        assert relative_error(x, y) <= min(TOLERANCE[dtype], 2e-5)
    assert not ring[3].any()


# ---- PyTorch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs, states = make(2, 7, 2, 16, 16, dtype, states=2)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(chunkwise.default, tuple(leaves))
    torch.library.opcheck(forward.default, (*leaves, *states), KEYWORDS)
    h, _, _, _, product = forward(*inputs, *states, **KEYWORDS)
    arguments = (torch.ones_like(h), None, None, *inputs, *states, h, product)
    torch.library.opcheck(backward.default, arguments, KEYWORDS)
    token = [x[:, 0] for x in inputs]
    torch.library.opcheck(step.default, (*token, *states))
    ring = make_ring(*inputs[1:3], 2)
    torch.library.opcheck(lazy.default, (*token, *states, *ring))
    torch.library.opcheck(fold.default, (*states, *ring))


def test_autocast():
    inputs, states = make(2, 70, 2, 32, 32, torch.float32, states=2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        h, c, _, _ = chunkwise(*inputs, *states)
    expected = chunkwise(*[x.bfloat16() for x in inputs[:3]], *inputs[3:], *states)
    assert h.dtype == torch.bfloat16 and torch.equal(h, expected[0]) and torch.equal(c, expected[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(64, 64), (256, 256)])
def test_no_synchronisation(sizes, dtype):
    inputs, states = make(2, 130, 2, *sizes, dtype, states=2)
    reset = torch.zeros(2, 130, dtype=torch.bool, device="cuda")
    weights = [torch.ones_like(inputs[2]), *[torch.ones_like(x) for x in states[:2]]]
    kernels = dtype != torch.float64  # the generic path reads resets on the host
    run(inputs, states, weights)
    with no_synchronisation():
        run(inputs, states, weights)
        step(*[x[:, 0] for x in inputs], *states)
        if kernels:
            run(inputs, states, weights, reset=reset)


def capture(function):
    """A CUDA graph of function(), after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(64, 64), (256, 256)])
def test_cuda_graph_of_forward_and_backward(sizes, dtype):
    inputs, states = make(2, 130, 2, *sizes, dtype, states=2)
    weights = [torch.ones_like(inputs[2]), *[torch.ones_like(x) for x in states[:2]]]
    graph, results = capture(lambda: run(inputs, states, weights))
    fresh = make(2, 130, 2, *sizes, dtype, states=2, seed=5)
    for x, y in zip([*inputs, *states], [*fresh[0], *fresh[1]]):
        x.copy_(y)
    graph.replay()
    for name, x, y in zip(NAMES, results, run(*fresh, weights)):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_of_the_step(dtype):
    inputs, states = make(2, 12, 2, 64, 128, dtype, states=2)
    token = [x[:, 0].clone() for x in inputs]
    state, other = [x.clone() for x in states], [x.clone() for x in states]
    graph, h = capture(lambda: step(*token, *state))
    for x, y in zip(state, states):
        x.copy_(y)
    for t in range(12):
        for x, y in zip(token, inputs):
            x.copy_(y[:, t])
        graph.replay()
        assert torch.equal(h, step(*[x[:, t] for x in inputs], *other))
    assert all(torch.equal(x, y) for x, y in zip(state, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_of_the_lazy_step(dtype):
    """One recording serves every fill of the ring: the count lies on the device."""
    inputs, states = make(2, 40, 2, 64, 128, dtype, states=2)
    token = [x[:, 0].clone() for x in inputs]
    state, other = [[x.clone() for x in states] for _ in range(2)]
    ring, same = (make_ring(*inputs[1:3], 16) for _ in range(2))
    graph, h = capture(lambda: lazy(*token, *state, *ring))
    for x, y in zip(state, states):
        x.copy_(y)
    ring[3].zero_()
    for t in range(40):
        for x, y in zip(token, inputs):
            x.copy_(y[:, t])
        graph.replay()
        assert torch.equal(h, lazy(*[x[:, t] for x in inputs], *other, *same))
    assert all(torch.equal(x, y) for x, y in zip([*state, ring[3]], [*other, same[3]]))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("case", [*step_inputs.CASES, {"channels": 2048, "heads": 4, "batch": 1},
                                  {"channels": 4096, "batch": 300}], ids=str)
def test_what_a_step_reads(case, dtype, tolerance):
    given = step_inputs.to(step_inputs.make(**case), dtype)
    got, wanted = step_inputs.step(step_inputs.to(given, "cuda")), step_inputs.step(step_inputs.to(given, torch.float64))
    with generic_path():
        other = step_inputs.step(step_inputs.to(given, "cuda"))
    for name, x in wanted.items():
        assert gpu_ops.relative_error(got[name], x) <= (0 if name == "window" else tolerance), name
        if dtype == torch.float32:
            assert gpu_ops.relative_error(got[name], other[name].cpu()) <= 2e-6, name


def test_other_streams_and_devices():
    inputs, states = make(2, 130, 2, 64, 64, torch.bfloat16, states=2)
    expected = chunkwise(*inputs, *states)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = chunkwise(*inputs, *states)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected))
    if torch.cuda.device_count() > 1:
        ours = chunkwise(*[x.to("cuda:1") for x in inputs], *[x.to("cuda:1") for x in states])
        assert ours[0].device == torch.device("cuda:1")
        assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(ours, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 64), (256, 512)], ids=str)
def test_a_query_of_zeros_reads_zeros(sizes, dtype):
    """The divisor is then exp(-m) alone, which is no number of float32 here, and there is no eps."""
    (q, k, v, igate, fgate), _ = make(1, 130, 2, *sizes, dtype)
    h = chunkwise(q.zero_(), k, v, igate + 200, fgate, eps=0.0)[0]
    assert (h == 0).all()


def test_errors_name_the_argument():
    inputs, states = make(2, 7, 2, 16, 16, torch.float32, states=2)
    with pytest.raises(RuntimeError, match="mlstm_chunkwise: k: expected device cuda:0, got cpu"):
        chunkwise(inputs[0], inputs[1].cpu(), *inputs[2:])
    with pytest.raises(RuntimeError, match="mlstm_chunkwise: c0: expected dtype Float, got BFloat16"):
        chunkwise(*inputs, states[0].bfloat16())
