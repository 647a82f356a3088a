"""gated_linear_attention on a GPU, against its definition in float64 on the CPU. Skipped without one."""

import pytest
import torch

from test_gated_ops import NAMES, SIZES, arguments, gated_loop, leaves, resets

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)


@pytest.mark.parametrize("sizes", [*SIZES, (2, 300, 2, 128, 256), (1, 40, 1, 1024, 8)])
@pytest.mark.parametrize("decay", ["mild", "strong", "none"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)])
def test_gated_linear_attention_equals_float64(sizes, decay, bonus, dtype, tolerance):
    inputs = arguments(sizes, decay, bonus, True, dtype)
    inputs[5] = inputs[5].float()
    reset = resets(*sizes[:2])
    ours = leaves([t if t is None else t.cuda() for t in inputs])
    loop = leaves([t if t is None else t.double() for t in inputs])
    out = torch.ops.xlstm.gated_linear_attention(*ours, reset=reset.cuda())
    wanted = gated_loop(*loop, reset=reset)
    gradients = [torch.randn_like(t).to(mine.dtype) for t, mine in zip(wanted, out)]
    torch.autograd.backward(out, [g.cuda() for g in gradients])
    torch.autograd.backward(wanted, [g.double() for g in gradients])
    terms = {"g": (loop[0] * loop[0].grad).norm()}  # dg is a difference of sums of q dq and k dk
    for name, mine, other in [("h", out[0], wanted[0]), ("state", out[1], wanted[1]),
                              *((n, a.grad, b.grad) for n, a, b in zip(NAMES, ours, loop) if a is not None)]:
        assert torch.isfinite(mine).all(), name
        assert (mine.cpu().double() - other).norm() <= tolerance * (other.norm() + terms.get(name, 0)), name
