"""Shared by the tests of the operators around the cells: each in plain ATen, its inputs, and how errors are judged."""

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


def conv_by_aten(x, weight, bias=None, state0=None, silu=False):
    """Also returns the final state."""
    width = weight.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state0 is None else state0
    whole = torch.cat([before, x], 1)
    if x.shape[1] == 0:
        return x, before
    y = F.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return (F.silu(y) if silu else y), whole[:, whole.shape[1] - (width - 1) :]


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
            randn(*rows, c, seed=3) * 2]


def residual_by_aten(x, branch, w=None, b=None, kind="layer"):
    total = x + branch
    return torch.stack([total, norm_by_aten(total[..., None, :], w, b, kind=kind)])


def residual_ours(*inputs, kind="layer"):
    return torch.stack(ops.residual_norm(*inputs, kind=kind))


def residual_inputs(rows=(3, 5), dim=21):
    return [randn(*rows, dim) * 2 + 1, randn(*rows, dim, seed=1), randn(dim), randn(dim, seed=2)]


def block_by_aten(x, w, b=None):
    y = torch.einsum("...bi,boi->...bo", x.unflatten(-1, (w.shape[0], w.shape[2])), w).flatten(-2)
    return y if b is None else y + b


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
