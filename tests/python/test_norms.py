"""The operators headwise_norm and residual_norm."""

import pytest
import torch
from torch.nn import functional as F

from pointwise import (
    norm_by_aten, norm_inputs, norm_ours, ops, randn, residual_by_aten, residual_inputs, residual_ours, run_with_grads)


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
        x.transpose(1, 2), w, b, s[:, 1:4], sw, u[..., 6:], kind=kind, gate_activation=act)
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
                  for f in (ops.residual_norm, residual_by_aten))
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
