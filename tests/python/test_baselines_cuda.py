"""wkv and selective_scan on a GPU, against their definitions in float64 on the CPU; memory. Skipped without one."""

import pytest
import torch

from test_baselines import resets, scan_arguments, scan_loop, with_gradients, wkv_arguments

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

ops = torch.ops.xlstm


def wkv_loop(k, v, w, u, a, b, p, reset):
    """From token to token with stabilised sums; exponents are constants."""
    out, p = [], p.detach()
    for t in range(k.shape[1]):
        empty = reset[:, t, None]
        a, b, p = a.masked_fill(empty, 0), b.masked_fill(empty, 0), p.masked_fill(empty, -1e38)
        now = u + k[:, t]
        peak, after = torch.maximum(p, now).detach(), torch.maximum(p - w, k[:, t]).detach()
        old, new = (p - peak).exp(), (now - peak).exp()
        out.append((old * a + new * v[:, t]) / (old * b + new))
        kept, entered = (p - w - after).exp(), (k[:, t] - after).exp()
        a, b, p = kept * a + entered * v[:, t], kept * b + entered, after
    return torch.stack(out, 1), a, b


@pytest.mark.parametrize("name", ["wkv", "selective_scan"])
@pytest.mark.parametrize("time", [1, 64, 65, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 8e-3)])
def test_scans_equal_float64(name, time, dtype, tolerance):
    make = wkv_arguments if name == "wkv" else lambda *s: scan_arguments(s[0], s[1], s[2], 16, s[3])
    inputs = [t.to(dtype) for t in make(2, time, 40, True)]
    reset = resets(2, time)
    ours, loop = with_gradients([t.cuda() for t in inputs]), with_gradients([t.double() for t in inputs])
    out = getattr(ops, name)(*ours, reset=reset.cuda())
    wanted = wkv_loop(*loop, reset) if name == "wkv" else scan_loop(*loop, reset=reset)
    gradients = [torch.randn_like(t).to(mine.dtype) for t, mine in zip(wanted, out)]
    torch.autograd.backward(out[:len(wanted)], [g.cuda() for g in gradients])
    torch.autograd.backward(wanted, [g.double() for g in gradients])
    for mine, other in [*zip(out, wanted), *((a.grad, b.grad) for a, b in zip(ours, loop) if b.grad is not None)]:
        assert torch.isfinite(mine).all()
        assert (mine.cpu().double() - other).norm() <= tolerance * other.norm().clamp_min(1e-30)


@pytest.mark.parametrize("time", [1, 64, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_gated_scan_equals_that_of_the_cpu(time, dtype, tolerance):
    """In passes here, token by token there; what stands before a reset does not pass it."""
    x, a = (torch.randn(2, time, 40, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    a, reset, weights = a.sigmoid(), resets(2, time), torch.randn(2, time, 40, generator=torch.Generator().manual_seed(3))
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [t.to(device, kind, copy=True).requires_grad_() for t in (x, a)]
        h = ops.gated_scan(*leaves, reset=reset.to(device))[0]
        h.backward(weights.to(device, kind))
        results.append([h.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*results):
        assert (got.cpu().double() - wanted).norm() <= tolerance * wanted.norm()


def test_memory_is_that_of_the_inputs():
    batch, time, dim, n = 2, 2048, 512, 16
    make = lambda *s: with_gradients([t if t is None else t.float().cuda() for t in scan_arguments(*s, False)])  # noqa: E731
    ops.selective_scan(*make(1, 2, 3, 4))[0].sum().backward()  # cuBLAS's workspaces, one for either thread, are no part of it
    arguments = make(batch, time, dim, n)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, state = ops.selective_scan(*arguments)
    held = torch.cuda.memory_allocated() - before
    assert held <= y.nbytes + state.nbytes + 2**20
    y.sum().backward()
    token = 4 * batch * dim * n
    # Gradients of the inputs, states at the borders of blocks of 64 tokens, some ten tensors of a block's states.
    assert torch.cuda.max_memory_allocated() - before <= 4 * y.nbytes + (time // 64 + 640) * token + 2**24 < time * token
