"""causal_conv1d, the norms, block_linear, linear_int8 and linear_cross_entropy on a GPU, against the same operators in float64
on the CPU. Skipped without one."""

import pytest
import torch

import libxlstm  # noqa: F401  registers the operators

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = "cuda"
ops = torch.ops.xlstm
# Relative errors in norm. float64 runs in ATen calls.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def randn(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)), dtype=torch.float64)


def results(function, inputs, weights):
    """Outputs and the gradients of their weighted sum."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, [w.to(o) for w, o in zip(weights, out)])
    return [*(o.detach() for o in out), *gradients]


def check(function, inputs, sizes, dtype, move=lambda x: x, least=1e-6):
    """function(*inputs) -> outputs of these sizes; from the same rounded inputs on the CPU and, moved, on the GPU. Errors count
    relative to the norm of a result, which counts as `least` at least."""
    inputs = [x.to(dtype) for x in inputs]
    weights = [randn(*s, seed=9 + i).to(dtype) for i, s in enumerate(sizes)]
    exact = results(function, [x.double() for x in inputs], [w.double() for w in weights])
    got = results(function, [move(x.to(DEVICE)) for x in inputs], [w.to(DEVICE) for w in weights])
    for i, (x, y) in enumerate(zip(got, exact)):
        assert torch.isfinite(x).all()
        assert (x.cpu().double() - y).norm() <= TOLERANCE[dtype] * y.norm().clamp_min(least), f"result {i}"


def conv(reset=None, cu_seqlens=None, silu=True):
    def run(x, w, b, s):
        place = [y if y is None else y.to(x.device) for y in (reset, cu_seqlens)]
        return ops.causal_conv1d(x, w, b, s, reset=place[0], cu_seqlens=place[1], silu=silu)

    return run


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [2, 4, 5, 8])
@pytest.mark.parametrize("channels", [1, 33, 256, 1000])
def test_conv_equals_float64(channels, width, dtype):
    for batch, time in ((2, 1), (2, 7), (3, 200)):
        inputs = [randn(batch, time, channels), randn(channels, width), randn(channels), randn(batch, width - 1, channels)]
        check(conv(silu=time != 7), inputs, [(batch, time, channels), (batch, width - 1, channels)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conv_resets_packed_and_strided(dtype):
    w, b = randn(40, 4), randn(40)
    reset = torch.zeros(2, 200, dtype=torch.bool)
    reset[0, [0, 1, 31, 32, 64, 199]] = True
    reset[1, [17, 127, 192]] = True
    sizes = [(2, 200, 40), (2, 3, 40)]
    check(conv(reset), [randn(2, 200, 40), w, b, randn(2, 3, 40)], sizes, dtype)
    cu = torch.tensor([0, 0, 1, 3, 64, 128, 193, 193, 200], dtype=torch.int32)
    check(conv(None, cu), [randn(1, 200, 40), w, b, randn(8, 3, 40)], [(1, 200, 40), (8, 3, 40)], dtype)
    spread = lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]  # noqa: E731
    check(conv(reset), [randn(2, 200, 40), w, b, randn(2, 3, 40)], sizes, dtype, spread)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [2, 4, 7])
def test_conv_step_equals_sequence(width, dtype):
    for channels in (24, 300, 33):
        x, w, b = (y.to(DEVICE, dtype) for y in (randn(3, 9, channels), randn(channels, width), randn(channels)))
        state = randn(3, width - 1, channels).to(DEVICE, dtype)
        y, last = ops.causal_conv1d(x, w, b, state.clone(), silu=True)
        for t in range(9):
            step = ops.causal_conv1d_step(x[:, t], w, b, state, silu=True)
            torch.testing.assert_close(step, y[:, t])
        assert torch.equal(state, last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_equals_float64(kind, dtype):
    for activation in ("silu", "sigmoid"):
        run = lambda *a: (ops.headwise_norm(*a, kind=kind, gate_activation=activation),)  # noqa: B023, E731
        for heads, dim in ((1, 64), (3, 33), (2, 1100)):
            width = heads * dim
            inputs = [randn(2, 5, heads, dim), randn(width), randn(width, seed=1), randn(2, 5, width), randn(width, seed=2)]
            check(run, [*inputs, randn(2, 5, width, seed=3)], [(2, 5, width)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_residual_norm_equals_float64(kind, dtype):
    for dim in (64, 33, 2100, 4200):
        inputs = [randn(2, 5, dim), randn(2, 5, dim, seed=1), randn(dim), randn(dim, seed=1)]
        check(lambda *a: ops.residual_norm(*a, kind=kind), inputs, [(2, 5, dim)] * 2, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("blocks, out, width", [(8, 4, 4), (12, 2, 2), (3, 8, 8), (5, 4, 4), (3, 5, 5), (2, 3, 5), (2, 40, 40)])
def test_block_linear_equals_float64(blocks, out, width, dtype):
    for rows in ((2, 7), (1,), (700,)):
        inputs = [randn(*rows, blocks * width), randn(blocks, out, width), randn(blocks * out)]
        for used in (inputs, inputs[:2]):
            check(lambda *a: (ops.block_linear(*a),), used, [(*rows, blocks * out)], dtype)


def int8(width, out=70):
    """linear_int8 with a matrix of its own, and that matrix."""
    weight = ops.quantize_int8(randn(out, width))
    return lambda x, *bias: (ops.linear_int8(x, weight.to(x.device), *bias),), weight.to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width, out", [(1, 3), (15, 1), (16, 70), (64, 64), (1000, 130), (4096, 33), (9000, 20)])
def test_linear_int8_equals_float64(width, out, dtype):
    run, _ = int8(width, out)
    for rows in ((), (2, 4), (9,), (16,), (17,), (3, 40)):  # beyond 16 a product of matrices
        inputs = [randn(*rows, width), randn(out)]
        for used in (inputs, inputs[:1]):
            check(run, used, [(*rows, out)], dtype)
            check(run, used, [(*rows, out)], dtype, lambda x: torch.stack([x, x], -1)[..., 0])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_int8_computes_each_row_as_it_does_alone(dtype):
    run, weight = int8(1000)
    x = randn(16, 1000).to(DEVICE, dtype)
    y = run(x)[0]
    for rows in (1, 3, 8):
        for first in range(0, 16, rows):
            part = run(x[first:first + rows])[0]
            assert torch.equal(part, y[first:first + rows]) or dtype == torch.float64
    bad = x.clone()
    bad[3, 5] = float("nan")
    spoiled = run(bad)[0]
    assert spoiled[3].isnan().all() and torch.isfinite(spoiled[[0, 1, 2, *range(4, 16)]]).all()
    wide = torch.cat([weight, weight], 1)[:, weight.size(1):]  # not packed
    assert (ops.linear_int8(x, wide) - y).double().norm() <= TOLERANCE[dtype] * y.double().norm()


@pytest.mark.parametrize("width", [512, 500])  # read as it is, and padded
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_int8_in_a_cuda_graph(width, dtype):
    _, weight = int8(width)
    x, bias = randn(4, width).to(DEVICE, dtype), randn(70).to(DEVICE, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.linear_int8(x, weight, bias)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_int8(x, weight, bias)
    x.copy_(randn(4, width, seed=3))
    graph.replay()
    assert torch.equal(y, ops.linear_int8(x, weight, bias)) and y.dtype == dtype


def entropy(target, **options):
    return lambda x, w: (ops.linear_cross_entropy(x, w, target.to(x.device), **options),)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [40, 36, 37, 1])  # rows of logits at 16 bytes, those of gradients too or not, neither
def test_linear_cross_entropy_equals_float64(vocab, reduction, dtype):
    target = torch.arange(150).view(3, 50) * 7 % vocab
    target[0, 3:9] = -100
    for soft_cap in (0.0, 2.0):
        run = entropy(target, reduction=reduction, soft_cap=soft_cap)
        sizes = [(3, 50) if reduction == "none" else ()]
        # With one word all results are zero: differences of equal numbers.
        check(run, [randn(3, 50, 24), 0.2 * randn(vocab, 24)], sizes, dtype, least=1 if vocab == 1 else 1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy_in_several_blocks_of_rows(reduction):
    target = torch.arange(150) * 5003 % 2**20
    target[[5, 64, 149]] = -100
    run = entropy(target, reduction=reduction)
    check(run, [randn(150, 3), 0.2 * randn(2**20, 3)], [(150,) if reduction == "none" else ()], torch.float32)


def test_a_target_outside_of_the_vocabulary_makes_its_loss_nan():
    x, w = randn(4, 8).to(DEVICE, torch.float32), randn(16, 8).to(DEVICE, torch.float32)
    target = torch.tensor([3, 16, -1, -100], device=DEVICE)
    loss, dx, _ = results(lambda x, w: (ops.linear_cross_entropy(x, w, target, reduction="none"),), [x, w],
                          [torch.ones(4, device=DEVICE)])
    assert loss.isnan().tolist() == [False, True, True, False] and loss[3] == 0
    assert dx.isnan().all(1).tolist() == [False, True, True, False] and (dx[3] == 0).all()


def between(x):
    """The same numbers, not at a multiple of 16 bytes."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_storage_that_begins_between_16_bytes(dtype):
    b, t, c = 2, 70, 64
    target = torch.arange(b * t).view(b, t) % 40
    check(conv(), [randn(b, t, c), randn(c, 4), randn(c), randn(b, 3, c)], [(b, t, c), (b, 3, c)], dtype, between)
    norm = [randn(b, t, 2, 32), randn(c), randn(c, seed=1), randn(b, t, c), randn(c, seed=2), randn(b, t, c, seed=3)]
    check(lambda *a: (ops.headwise_norm(*a),), norm, [(b, t, c)], dtype, between)
    check(ops.residual_norm, [randn(b, t, c), randn(b, t, c, seed=1), randn(c)], [(b, t, c)] * 2, dtype, between)
    check(lambda *a: (ops.block_linear(*a),), [randn(b, t, c), randn(16, 4, 4), randn(c)], [(b, t, c)], dtype, between)
    check(int8(c)[0], [randn(2, 7, c), randn(70)], [(2, 7, 70)], dtype, between)
    check(entropy(target), [randn(b, t, c), 0.2 * randn(40, c)], [()], dtype, between)


def test_tensors_of_the_cpu_are_refused():
    x, w, b = (randn(*s).to(DEVICE) for s in ((5, 8), (2, 4, 4), (8,)))
    for given in ((x, w.cpu()), (x, w, b.cpu())):
        with pytest.raises(RuntimeError, match="block_linear: (weight|bias): expected device cuda:0, got cpu"):
            ops.block_linear(*given)
    target = torch.arange(5)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: target: expected device cuda:0, got cpu"):
        ops.linear_cross_entropy(x, randn(9, 8).to(DEVICE), target)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: weight: expected device cuda:0, got cpu"):
        ops.linear_cross_entropy(x, randn(9, 8), target.to(DEVICE))
    with pytest.raises(RuntimeError, match="linear_cross_entropy: weight: expected device cpu, got cuda:0"):
        ops.linear_cross_entropy(x.cpu(), randn(9, 8).to(DEVICE), target)


def test_repeats_are_equal_to_the_bit_and_nothing_waits():
    inputs = [x.to(DEVICE, torch.bfloat16) for x in (randn(4, 3000, 64), randn(64, 4), randn(64), randn(4, 3, 64))]
    weights = [torch.ones(4, 3000, 64, device=DEVICE), torch.ones(4, 3, 64, device=DEVICE)]
    first = results(conv(), inputs, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = results(conv(), inputs, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, second))
