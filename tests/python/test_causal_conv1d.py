"""The operators causal_conv1d and causal_conv1d_step."""

import pytest
import torch

from pointwise import DTYPES, conv_by_aten, ops, randn, run_with_grads


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
