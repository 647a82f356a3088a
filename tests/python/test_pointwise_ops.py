"""The operators around the cells: causal_conv1d, headwise_norm, residual_norm, block_linear, linear_cross_entropy."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import libxlstm  # noqa: F401  registers the operators

ops = torch.ops.xlstm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*sizes, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed + sum(sizes) + 31 * len(sizes))
    return torch.randn(sizes, generator=g, dtype=torch.float64).requires_grad_(grad)


def max_error(got, exact):
    return max((g.double() - e).abs().max().item() if e.numel() else 0.0 for g, e in zip(got, exact))


def run_with_grads(function, inputs, weights=None):
    """Outputs and gradients of sum(output * fixed weights)."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = randn(*out.shape, seed=9).to(out.dtype) if weights is None else weights.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_no_worse(ours, aten, inputs, dtype):
    """Error against float64 at most twice that of the same ATen run in this dtype."""
    exact = run_with_grads(aten, inputs)
    low = [x.to(dtype) for x in inputs]
    rounded = run_with_grads(aten, [x.double() for x in low])
    got, plain = run_with_grads(ours, low), run_with_grads(aten, low)
    for i, (g, p, r) in enumerate(zip(got, plain, rounded)):
        assert g.dtype == p.dtype
        scale = exact[i].abs().max().item()
        floor = torch.finfo(g.dtype).eps * scale  # one unit of rounding where ATen happens to be exact
        assert max_error([g], [r]) <= 2 * max_error([p], [r]) + floor, f"result {i}"


# ---------------------------------------------------------------- causal_conv1d


def conv_by_aten(x, weight, bias=None, state0=None, silu=False):
    """Also returns the final state."""
    width = weight.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state0 is None else state0
    whole = torch.cat([before, x], 1)
    if x.shape[1] == 0:
        return x, before
    y = F.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return (F.silu(y) if silu else y), whole[:, whole.shape[1] - (width - 1) :]


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("time", [2, 9, 150])
def test_conv_equals_conv1d(width, time):
    channels = 37
    x, w, b = randn(2, time, channels), randn(channels, width), randn(channels)
    s = randn(2, width - 1, channels)
    for silu in (False, True):
        for state0 in (None, s):
            inputs = [x, w, b] + ([] if state0 is None else [state0])

            def total(function):
                def run(x, w, b, s=None):
                    y, state = function(x, w, b, s, silu=silu)
                    return torch.cat([y.flatten(), state.flatten()])

                return run

            ours = run_with_grads(total(ops.causal_conv1d), inputs)
            aten = run_with_grads(total(conv_by_aten), inputs)
            for got, want in zip(ours, aten):
                torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_conv_documents_equal_separate_runs(packed):
    """Resets inside a row and cu_seqlens against one call per document."""
    channels, width, lengths = 19, 4, [0, 1, 2, 70, 3, 0, 5]
    time, x, w, b = sum(lengths), None, randn(channels, width), randn(channels)
    x = randn(1, time, channels)
    states = randn(len(lengths), width - 1, channels)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    pieces, finals = [], []
    for i, length in enumerate(lengths):
        first = states[i : i + 1] if packed else None
        y, state = conv_by_aten(x[:, starts[i] : starts[i] + length], w, b, first, silu=True)
        pieces.append(y)
        finals.append(state)
    if packed:
        cu = torch.tensor(starts, dtype=torch.int32)
        y, state = ops.causal_conv1d(x, w, b, states, cu_seqlens=cu, silu=True)
        torch.testing.assert_close(state, torch.cat(finals), atol=0, rtol=0)
    else:
        reset = torch.zeros(1, time, dtype=torch.bool)
        reset[0, [s for s, n in zip(starts, lengths) if n]] = True
        y, state = ops.causal_conv1d(x, w, b, reset=reset, silu=True)
        torch.testing.assert_close(state, finals[-1], atol=0, rtol=0)
    torch.testing.assert_close(y, torch.cat(pieces, 1), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_conv_isolates_documents_bitwise(dtype):
    """NaN in one document changes no bit of another one's outputs and gradients."""
    channels, time = 33, 40
    clean = randn(2, time, channels).to(dtype)
    reset = torch.zeros(2, time, dtype=torch.bool)
    reset[0, [0, 7, 8, 30, 38]] = True
    reset[1, [3, 38]] = True
    own = torch.zeros(2, time, dtype=torch.bool)
    own[0, 8:30] = True
    own[1, 3:38] = True
    dirty = torch.where(own[..., None], clean, torch.nan)
    w, b = randn(channels, 4).to(dtype), randn(channels).to(dtype)
    dy = randn(2, time, channels, seed=3).to(dtype)
    results = []
    for x, g in [(clean, dy), (dirty, torch.where(own[..., None], dy, torch.nan))]:
        x = x.clone().requires_grad_()
        state0 = torch.full((2, 3, channels), torch.nan if g is not dy else 1.0, dtype=dtype)
        y, _ = ops.causal_conv1d(x, w, b, state0, reset=reset, silu=True)
        (dx,) = torch.autograd.grad(y, x, g)
        results.append((y[own], dx[own]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].isfinite().all()


def test_conv_empty_time_passes_state_through():
    state0, w = randn(2, 3, 5, grad=True), randn(5, 4, grad=True)
    y, state = ops.causal_conv1d(randn(2, 0, 5), w, None, state0)
    assert y.shape == (2, 0, 5)
    assert torch.equal(state, state0) and state.data_ptr() != state0.data_ptr()
    g = randn(2, 3, 5, seed=4)
    ds, dw = torch.autograd.grad(state, [state0, w], g)
    assert torch.equal(ds, g) and not dw.any()


@pytest.mark.parametrize("case", ["plain", "silu", "reset", "packed", "short"])
def test_conv_gradcheck(case):
    time = 2 if case == "short" else 7
    wide = randn(1, time, 12, grad=True)
    w, b = randn(6, 4, grad=True), randn(6, grad=True)
    keywords = dict(silu=case != "plain")
    count = 1
    if case in ("reset", "short"):
        keywords["reset"] = torch.tensor([[False, True] + [False, False, True, True, False][: time - 2]])
    if case == "packed":
        keywords["cu_seqlens"], count = torch.tensor([0, 2, 2, 7], dtype=torch.int32), 3
    state0 = randn(count, 3, 6, grad=True)
    # x is a slice of channels: row stride 12
    f = lambda u, w, b, s: ops.causal_conv1d(u[..., 6:], w, b, s, **keywords)  # noqa: E731
    assert torch.autograd.gradcheck(f, (wide, w, b, state0))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("silu", [False, True])
def test_conv_step_equals_sequence(dtype, silu):
    x, w, b = randn(3, 9, 21).to(dtype), randn(21, 4).to(dtype), randn(21).to(dtype)
    state = randn(3, 3, 42).to(dtype)[..., 1::2]  # not even unit stride
    y, last = ops.causal_conv1d(x, w, b, state.clone(), silu=silu)
    version = state._version
    for t in range(9):
        torch.testing.assert_close(ops.causal_conv1d_step(x[:, t], w, b, state, silu=silu), y[:, t])
    assert torch.equal(state, last) and state._version > version


def test_conv_step_refuses_a_backward_pass():
    state = torch.zeros(1, 3, 4)
    y = ops.causal_conv1d_step(torch.ones(1, 4, requires_grad=True), torch.ones(4, 4), None, state)
    with pytest.raises(RuntimeError, match="causal_conv1d_step has no gradient"):
        y.sum().backward()


# ---------------------------------------------------------------- headwise_norm


def norm_by_aten(x, w=None, b=None, skip=None, skip_weight=None, gate=None, eps=1e-5, kind="layer", act="silu"):
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    y = norm(x, x.shape[-1:], eps=eps).flatten(-2)
    y = y if w is None else y * w
    y = y if b is None else y + b
    y = y if skip is None else y + skip_weight * skip
    return y if gate is None else y * (F.silu(gate) if act == "silu" else torch.sigmoid(gate))


def norm_ours(kind, act):
    return lambda *a: ops.headwise_norm(*a, kind=kind, gate_activation=act)


def norm_inputs(rows=(3, 5), heads=3, dim=21):
    c = heads * dim
    return [randn(*rows, heads, dim) * 2 + 1, randn(c), randn(c, seed=1), randn(*rows, c), randn(c, seed=2),
            randn(*rows, c, seed=3) * 2]  # fmt: skip


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
@pytest.mark.parametrize("sizes", [((3, 5), 3, 21), ((70,), 1, 130), ((2,), 2, 1), ((0, 4), 2, 8), ((130,), 4, 16)])
def test_norm_equals_aten(kind, act, sizes):
    inputs = norm_inputs(*sizes)
    ours = run_with_grads(norm_ours(kind, act), inputs)
    aten = run_with_grads(lambda *a: norm_by_aten(*a, kind=kind, act=act), inputs)
    for got, want in zip(ours, aten):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("present", range(16))
def test_norm_optional_arguments(present):
    x, w, b, skip, skip_weight, gate = norm_inputs()
    names = {"weight": w} if present & 1 else {}
    names |= {"bias": b} if present & 2 else {}
    names |= {"skip": skip, "skip_weight": skip_weight} if present & 4 else {}
    names |= {"gate": gate} if present & 8 else {}
    rename = {"weight": "w", "bias": "b"}
    ours = lambda x, *a: ops.headwise_norm(x, **dict(zip(names, a)))  # noqa: E731
    aten = lambda x, *a: norm_by_aten(x, **{rename.get(n, n): v for n, v in zip(names, a)})  # noqa: E731
    inputs = [x, *names.values()]
    for got, want in zip(run_with_grads(ours, inputs), run_with_grads(aten, inputs)):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_norm_equals_named_norms():
    x, w, b = torch.randn(6, 96), torch.randn(96), torch.randn(96)
    close = dict(atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(ops.headwise_norm(x[:, None], w, b), F.layer_norm(x, (96,), w, b), **close)
    torch.testing.assert_close(ops.headwise_norm(x[:, None], w, kind="rms"), F.rms_norm(x, (96,), w, 1e-5), **close)
    torch.testing.assert_close(ops.headwise_norm(x.view(6, 4, 24), w, b), F.group_norm(x, 4, w, b), **close)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
def test_norm_gradcheck_on_views(kind, act):
    up = randn(2, 3, 12, grad=True)  # gate = up[..., 6:], x transposed, skip a time slice
    x, skip = randn(2, 2, 3, 3, grad=True), randn(2, 5, 6, grad=True)
    w, b, sw = (randn(6, seed=i, grad=True) for i in range(3))
    f = lambda x, w, b, s, sw, u: ops.headwise_norm(  # noqa: E731
        x.transpose(1, 2), w, b, s[:, 1:4], sw, u[..., 6:], kind=kind, gate_activation=act)  # fmt: skip
    assert torch.autograd.gradcheck(f, (x, w, b, skip, sw, up))


def test_norm_keeps_a_large_mean():
    x = torch.randn(8, 1, 64) + 1e4
    torch.testing.assert_close(ops.headwise_norm(x), F.layer_norm(x.double(), (64,))[:, 0].float(), atol=2e-3, rtol=0)


def test_norm_mixed_dtypes():
    """Autocast leaves float32 parameters beside bfloat16 activations."""
    x, w, b, skip, sw, gate = (t.float() for t in norm_inputs())
    leaves = [x.bfloat16(), w, b, skip.bfloat16(), sw, gate.bfloat16()]
    leaves = [t.requires_grad_() for t in leaves]
    y = ops.headwise_norm(*leaves)
    assert y.dtype == torch.bfloat16
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves)):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape


# ---------------------------------------------------------------- residual_norm


def residual_by_aten(x, branch, w=None, b=None, kind="layer"):
    total = x + branch
    return torch.stack([total, norm_by_aten(total[..., None, :], w, b, kind=kind)])


def residual_ours(*inputs, kind="layer"):
    return torch.stack(ops.residual_norm(*inputs, kind=kind))


def residual_inputs(rows=(3, 5), dim=21):
    return [randn(*rows, dim) * 2 + 1, randn(*rows, dim, seed=1), randn(dim), randn(dim, seed=2)]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("parameters", [0, 1, 2])
@pytest.mark.parametrize("sizes", [((3, 5), 21), ((70,), 130), ((), 7), ((2,), 1), ((0, 4), 16)])
def test_residual_norm_equals_aten(kind, parameters, sizes):
    inputs = residual_inputs(*sizes)[: 2 + parameters]
    ours = run_with_grads(lambda *a: residual_ours(*a, kind=kind), inputs)
    aten = run_with_grads(lambda *a: residual_by_aten(*a, kind=kind), inputs)
    for got, want in zip(ours, aten, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("used", [0, 1])
def test_residual_norm_with_one_result_used(used):
    inputs = residual_inputs()
    ours, aten = (run_with_grads(lambda *a: f(*a)[used], inputs[: 2 + 2 * used])  # noqa: B023
                  for f in (ops.residual_norm, residual_by_aten))  # fmt: skip
    for got, want in zip(ours, aten, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_residual_norm_gradcheck_on_views(kind):
    x, branch, w, b = randn(3, 2, 6, grad=True), randn(2, 5, 12, grad=True), randn(6, grad=True), randn(6, grad=True)
    f = lambda x, y, w, b: residual_ours(x.transpose(0, 1), y[:, 1:4, ::2], w, b, kind=kind)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, branch, w, b))


@pytest.mark.parametrize("types", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2])
def test_residual_norm_is_the_norm_of_the_rounded_sum(types):
    """Under autocast a branch comes in bfloat16 to a stream in float32."""
    x, branch, w, b = (t.float() for t in residual_inputs((40,), 96))
    leaves = [t.requires_grad_() for t in (x.to(types[0]), branch.to(types[1]), w, b)]
    total, y = ops.residual_norm(*leaves)
    assert total.dtype == y.dtype == torch.promote_types(*types)
    assert torch.equal(total, leaves[0] + leaves[1])
    assert torch.equal(y, ops.headwise_norm(total[:, None], w, b))
    for leaf, grad in zip(leaves, torch.autograd.grad([total, y], leaves, [torch.ones_like(y)] * 2)):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape


# ---------------------------------------------------------------- block_linear


def block_by_aten(x, w, b=None):
    y = torch.einsum("...bi,boi->...bo", x.unflatten(-1, (w.shape[0], w.shape[2])), w).flatten(-2)
    return y if b is None else y + b


BLOCKS = [(5, 4, 4), (16, 4, 4), (33, 2, 2), (9, 8, 8), (3, 16, 16), (7, 3, 5), (2, 16, 1), (4, 1, 12), (1, 1, 1),
          (4, 13, 13), (3, 17, 9), (4, 64, 64), (2, 40, 33)]  # fmt: skip


@pytest.mark.parametrize("blocks,out,width", BLOCKS)
def test_block_linear_equals_einsum(blocks, out, width):
    for rows in [(2, 3), (1,), (300,), (0, 2)]:
        inputs = [randn(*rows, blocks * width), randn(blocks, out, width), randn(blocks * out)]
        for used in (inputs, inputs[:2]):
            ours, aten = run_with_grads(ops.block_linear, used), run_with_grads(block_by_aten, used)
            for got, want in zip(ours, aten):
                torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("blocks,out,width", [(3, 4, 4), (2, 3, 5), (2, 17, 3)])
def test_block_linear_gradcheck_on_views(blocks, out, width):
    c = blocks * width
    up, w, b = randn(2, 4, 2 * c, grad=True), randn(blocks, out, width, grad=True), randn(blocks * out, grad=True)
    assert torch.autograd.gradcheck(lambda u, w, b: ops.block_linear(u[..., c:], w, b), (up, w, b))
    assert torch.autograd.gradcheck(lambda u, w, b: ops.block_linear(u[:, 1:3, :c], w, b), (up, w, b))
    y = ops.block_linear(up[:1, :1, :c].expand(3, 2, c), w)
    torch.testing.assert_close(y, block_by_aten(up[:1, :1, :c], w).expand_as(y))


# ---------------------------------------------------------------- linear_cross_entropy


def entropy_by_aten(x, w, target, ignore_index=-100, soft_cap=0.0, reduction="mean"):
    logits = x @ w.t()
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    logits = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def entropy_inputs(rows=(3, 50), width=20, vocab=37, ignored=0.2):
    target = (randn(*rows, seed=5).abs() * 1e4).long() % vocab
    target[randn(*rows, seed=6) < -1 + 2 * ignored] = -100
    return [randn(*rows, width), randn(vocab, width)], target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("sizes", [((3, 50), 20, 37), ((1,), 1, 1), ((2500,), 8, 130), ((130,), 4, 70001)])
def test_entropy_equals_aten(reduction, soft_cap, sizes):
    for ignored in (-1.0, 0.2):
        inputs, target = entropy_inputs(*sizes, ignored)
        keywords = dict(soft_cap=soft_cap, reduction=reduction)
        ours = run_with_grads(lambda x, w: ops.linear_cross_entropy(x, w, target, **keywords), inputs)
        aten = run_with_grads(lambda x, w: entropy_by_aten(x, w, target, **keywords), inputs)
        for got, want in zip(ours, aten):
            if target.ne(-100).any() or reduction != "mean":
                torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_entropy_gradcheck(reduction):
    (x, w), target = entropy_inputs((7,), 5, 11)
    x = x.t().contiguous().t()  # column-major
    f = lambda x, w: ops.linear_cross_entropy(x, w, target, soft_cap=3.0, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), w.requires_grad_()))
    for frozen in (0, 1):  # one of the two gradients alone
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, w))]
        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_entropy_of_ignored_rows_is_exactly_zero(reduction):
    (x, w), target = entropy_inputs()
    x[target == -100] = torch.nan
    loss, dx, dw = run_with_grads(lambda x, w: ops.linear_cross_entropy(x, w, target, reduction=reduction), [x, w])
    assert loss.isfinite().all() and dw.isfinite().all()
    assert not dx[target == -100].any()
    nothing = torch.full_like(target, -100)
    for result in run_with_grads(lambda x, w: ops.linear_cross_entropy(x, w, nothing, reduction=reduction), [x, w]):
        assert not result.any()
    empty = ops.linear_cross_entropy(x[:0], w, target[:0], reduction=reduction)
    assert not empty.any() and empty.shape == (target[:0].shape if reduction == "none" else ())


def test_entropy_of_extreme_logits():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e38, 1e38, 0.0], [0.0, 50.0, -50.0], [torch.nan, 0.0, 0.0]])
    target = torch.tensor([0, 1, 1, 1])
    ours, aten = (f(x, torch.eye(3), target, reduction="none") for f in (ops.linear_cross_entropy, entropy_by_aten))
    torch.testing.assert_close(ours, aten, equal_nan=True)


def test_entropy_half_gradients_survive_a_loss_scale():
    """Rows share 1/N; rounded before the loss scale came in, float16 gradients would vanish."""
    x, w = torch.randn(4000, 4), torch.randn(6, 4) * 0.1
    target = torch.randint(6, (4000,))
    grads = []
    for dtype in (torch.float16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        (ops.linear_cross_entropy(leaf, w.to(dtype), target) * 1e-3 * 65536).backward()
        grads.append(leaf.grad.float())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=2e-3)


# ---------------------------------------------------------------- all of them


def low_precision_cases():
    target = torch.randint(50, (200,), generator=torch.Generator().manual_seed(0))
    conv = [randn(2, 70, 40), randn(40, 4), randn(40), randn(2, 3, 40)]
    yield "conv", lambda *a: ops.causal_conv1d(*a, silu=True)[0], lambda *a: conv_by_aten(*a, silu=True)[0], conv
    yield "layer", norm_ours("layer", "silu"), norm_by_aten, norm_inputs()
    yield "rms", norm_ours("rms", "sigmoid"), lambda *a: norm_by_aten(*a, kind="rms", act="sigmoid"), norm_inputs()
    for kind in ("layer", "rms"):
        ours, aten = (lambda *a, f=f, kind=kind: f(*a, kind=kind) for f in (residual_ours, residual_by_aten))
        yield f"residual {kind}", ours, aten, residual_inputs((90,), 64)
    for shape in [(16, 4, 4), (5, 3, 7), (2, 48, 64)]:
        block = [randn(100, shape[0] * shape[2]), randn(*shape), randn(shape[0] * shape[1])]
        yield f"block{shape}", ops.block_linear, block_by_aten, block
    yield ("entropy", lambda x, w: ops.linear_cross_entropy(x, w, target),
           lambda x, w: entropy_by_aten(x, w, target), [randn(200, 30), randn(50, 30)])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,ours,aten,inputs", list(low_precision_cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_low_precision(name, ours, aten, inputs, dtype):
    assert_no_worse(ours, aten, inputs, dtype)


OPCHECK_CASES = {
    "causal_conv1d": lambda r: ((r(2, 5, 6)[..., ::2], r(3, 4), r(3), r(2, 3, 3)), dict(silu=True)),
    "causal_conv1d packed": lambda r: (
        (r(1, 5, 6), r(6, 3)), dict(cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))),
    "headwise_norm": lambda r: ((r(2, 5, 2, 3), r(6), r(6), r(2, 5, 6), r(6), r(2, 5, 12)[..., 6:]), {}),
    "headwise_norm rms": lambda r: ((r(2, 5, 6),), dict(kind="rms")),
    "residual_norm": lambda r: ((r(2, 5, 6), r(2, 5, 12)[..., 6:], r(6), r(6)), {}),
    "residual_norm rms": lambda r: ((r(5, 6), r(5, 6)), dict(kind="rms")),
    "block_linear": lambda r: ((r(2, 5, 12), r(3, 2, 4), r(6)), {}),
    "block_linear large": lambda r: ((r(5, 36), r(2, 17, 18)), {}),
    "linear_cross_entropy": lambda r: ((r(2, 5, 3), r(7, 3), torch.arange(10).view(2, 5) % 7), dict(soft_cap=2.0)),
    "linear_cross_entropy none": lambda r: ((r(5, 3), r(7, 3), torch.arange(5)), dict(reduction="none")),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck(name):
    args, keywords = OPCHECK_CASES[name](lambda *s: torch.randn(*s, requires_grad=True))
    torch.library.opcheck(getattr(ops, name.split()[0]).default, args, keywords)


def test_opcheck_backward_and_step():
    r = torch.randn
    check = torch.library.opcheck
    none = dict(reset=None, cu_seqlens=None, silu=True)
    check(ops.causal_conv1d_backward.default, (r(2, 5, 3), None, r(2, 5, 3), r(3, 4), r(3), r(2, 3, 3)), none)
    check(ops.causal_conv1d_backward.default, (None, r(2, 3, 3), r(2, 5, 3), r(3, 4), None, None), none)
    check(ops.causal_conv1d_step.default, (r(2, 3), r(3, 4), r(3), r(2, 3, 3)))
    norm = dict(eps=1e-5, kind="layer", gate_activation="silu")
    check(ops.headwise_norm_backward.default, (r(5, 6), r(5, 2, 3), r(6), None, r(5, 6), r(6), r(5, 6)), norm)
    check(ops.headwise_norm_backward.default, (r(5, 6), r(5, 2, 3), None, None, None, None, None), norm)
    norm = dict(eps=1e-5, kind="rms")
    check(ops.residual_norm_backward.default, (r(5, 6), r(5, 6), r(5, 6), r(6), r(6)), norm)
    check(ops.residual_norm_backward.default, (None, r(5, 6), r(5, 6), None, None), norm)
    check(ops.block_linear_backward.default, (r(5, 6), r(5, 12), r(3, 2, 4)), dict(has_bias=True))
    entropy = dict(ignore_index=-100, soft_cap=0.0)
    args = (r(5, 3), r(7, 3), torch.arange(5))
    for need in (True, False):
        check(ops.linear_cross_entropy_forward.default, args,
              dict(entropy, reduction="mean", need_dx=need, need_dweight=not need))  # fmt: skip
    check(ops.linear_cross_entropy_backward.default, (r(()), *args, r(5, 3), None), dict(entropy, reduction="sum"))
    check(ops.linear_cross_entropy_backward.default, (r(5), *args, None, None), dict(entropy, reduction="none"))


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_second_derivative_is_a_clear_error(name):
    args, keywords = OPCHECK_CASES[name](lambda *s: torch.randn(*s, requires_grad=True))
    outputs = getattr(ops, name.split()[0])(*args, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (first,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name.split()[0]}_backward is not implemented"):
        first.square().sum().backward()


def test_repeats_and_thread_counts_agree_bitwise():
    """Sums of weight gradients have one order, whatever the number of threads (GEMMs are the BLAS's affair)."""
    conv = [randn(3, 300, 40), randn(40, 4), randn(40), randn(3, 3, 40)]
    block = [randn(900, 64), randn(16, 4, 4), randn(64)]
    cases = [
        (lambda *a: ops.causal_conv1d(*a, silu=True)[0], conv),
        (ops.headwise_norm, norm_inputs((900,))),
        (residual_ours, residual_inputs((900,))),
        (ops.block_linear, block),
    ]
    threads = torch.get_num_threads()
    try:
        for function, inputs in cases:
            inputs = [x.float() for x in inputs]
            runs = []
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                runs.append(run_with_grads(function, inputs))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
    finally:
        torch.set_num_threads(threads)
    (x, w), target = entropy_inputs()
    entropy = lambda x, w: ops.linear_cross_entropy(x, w, target)  # noqa: E731
    for a, b in zip(run_with_grads(entropy, [x.float(), w.float()]), run_with_grads(entropy, [x.float(), w.float()])):
        assert torch.equal(a, b)


def test_autocast():
    x, w = torch.randn(6, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    head, target = torch.randn(9, 12, requires_grad=True), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.block_linear(x, w)
        assert y.dtype == torch.bfloat16
        y = ops.headwise_norm(y[:, None], torch.ones(12))
        assert y.dtype == torch.bfloat16
        y = ops.causal_conv1d(y[None], torch.randn(12, 4))[0]
        assert y.dtype == torch.bfloat16
        loss = ops.linear_cross_entropy(y[0], head, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == head.grad.dtype == torch.float32


def test_compiles_whole():
    def function(x, conv, w, norm, head, target):
        y = ops.causal_conv1d(x, conv, silu=True)[0]
        y = ops.block_linear(y, w)
        y = ops.headwise_norm(y.unflatten(-1, (2, 6)), norm, gate=x)
        return ops.linear_cross_entropy(y, head, target)

    inputs = [randn(2, 5, 12), randn(12, 4), randn(3, 4, 4), randn(12), randn(9, 12)]
    target = torch.arange(10).view(2, 5) % 9
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = run_with_grads(lambda *a: function(*a, target), inputs)
    for got, expected in zip(run_with_grads(lambda *a: compiled(*a, target), inputs), want):
        torch.testing.assert_close(got, expected)


x3, w24 = torch.zeros(2, 3, 4), torch.zeros(4, 2)
ERRORS = [
    (lambda: ops.causal_conv1d(x3[0], w24), r"x: expected \(B,T,C\)"),
    (lambda: ops.causal_conv1d(x3, torch.zeros(5, 4)), r"weight: expected shape \(C,W\) = \(4,W\), got \[5, 4\]"),
    (lambda: ops.causal_conv1d(x3, torch.zeros(4, 9)), "width W of 2 to 8, got 9"),
    (lambda: ops.causal_conv1d(x3, w24, torch.zeros(3)), "bias: expected"),
    (lambda: ops.causal_conv1d(x3, w24, None, torch.zeros(2, 2, 4)), r"state0: expected .* \(2,1,4\)"),
    (lambda: ops.causal_conv1d(x3, w24, reset=torch.zeros(2, 3)), "reset: expected bool"),
    (lambda: ops.causal_conv1d(x3, w24, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)), "expected B = 1"),
    (lambda: ops.causal_conv1d(x3[:1], w24, cu_seqlens=torch.tensor([0, 3])), "cu_seqlens: expected int32"),
    (lambda: ops.causal_conv1d(x3[:1], w24, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)), "end at T = 3"),
    (lambda: ops.causal_conv1d(x3[:1], w24, cu_seqlens=torch.tensor([0, 4, 3], dtype=torch.int32)), "ascending"),
    (lambda: ops.causal_conv1d(x3.int(), w24), "x: expected float32, float64, bfloat16 or float16, got Int"),
    (lambda: ops.causal_conv1d_step(x3[0], w24, None, torch.zeros(3, 1, 3)), "state: expected"),
    (lambda: ops.headwise_norm(x3, torch.zeros(11)), r"weight: expected shape \(NH\*DH\) = \(12\), got \[11\]"),
    (lambda: ops.headwise_norm(x3, skip=torch.zeros(2, 12)), "skip and skip_weight come together, got only skip"),
    (lambda: ops.headwise_norm(x3, gate=torch.zeros(3, 12)), r"gate: expected shape .* \[2, 12\], got \[3, 12\]"),
    (lambda: ops.headwise_norm(x3, kind="batch"), 'kind: expected "layer" or "rms", got "batch"'),
    (lambda: ops.headwise_norm(x3, gate_activation="tanh"), "gate_activation: expected"),
    (lambda: ops.headwise_norm(torch.zeros(3)), r"expected \(...,NH,DH\)"),
    (lambda: ops.residual_norm(x3, x3[0]), r"branch: expected x's shape = \[2, 3, 4\], got \[3, 4\]"),
    (lambda: ops.residual_norm(x3, x3.int()), "residual_norm: branch: expected float32, .* got Int"),
    (lambda: ops.residual_norm(x3, x3, torch.zeros(5)), r"residual_norm: weight: expected shape .* = \(4\), got \[5\]"),
    (lambda: ops.residual_norm(x3, x3, kind="batch"), 'residual_norm: kind: expected "layer" or "rms", got "batch"'),
    (lambda: ops.block_linear(x3, torch.zeros(2, 3, 3)), r"NB\*I = 6 .* got shape \[2, 3, 4\]"),
    (lambda: ops.block_linear(x3, torch.zeros(2, 3, 2).double()), "weight: expected x's dtype Float, got Double"),
    (lambda: ops.block_linear(x3, torch.zeros(2, 3, 2), torch.zeros(5)), r"bias: expected shape \(NB\*O\) = \(6\)"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.tensor([[0, 1, 2], [3, 7, 0]])),
     "target: expected 0 to 4 or ignore_index -100, got 7 at position 4"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 3), torch.zeros(2, 3).long()), r"weight: expected \(V,D\)"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.zeros(2, 3)), "target: expected int64"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.zeros(2, 3).long(), reduction="max"), "reduction:"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.zeros(2, 3).long(), soft_cap=-1.0), "soft_cap:"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_name_argument_expected_and_got(case):
    call, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The kernels of lesser machines give the same results."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("already inside such a run")
    tests = "documents_equal or low_precision or optional_arguments or einsum and (2-2 or 4-4 or 8-8)"
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
