"""Forward-mode derivatives: no operator has them, and none gives zeros in their place."""

import pytest
import torch

import libxlstm  # noqa: F401  registers the operators

ops = torch.ops.xlstm
B, T, NH, D = 2, 5, 2, 4


def tensors(*shapes):
    return [torch.randn(shape) for shape in shapes]


def gated(count):
    return tensors(*[(B, T, NH, D)] * count)


OPERATORS = {
    "mlstm_chunkwise": lambda: gated(3) + tensors(*[(B, T, NH)] * 2),
    "mlstm_step": lambda: tensors(*[(B, NH, D)] * 3, *[(B, NH)] * 2, (B, NH, D, D), (B, NH, D), (B, NH)),
    "mlstm_step_inputs": lambda: [*tensors((B, D), (D, 4)), None, *[torch.randn(2, 2, 2), None] * 3,
                                  *tensors((NH, 3 * D), (NH,)) * 2, torch.randn(B, 3, D)],
    "slstm": lambda: tensors((B, T, 4, NH, D), (4, NH, D, D), (4, NH, D)),
    "causal_conv1d": lambda: tensors((B, T, D), (D, 4)),
    "causal_conv1d_step": lambda: [*tensors((B, D), (D, 4)), None, torch.randn(B, 3, D)],
    "headwise_norm": lambda: gated(1),
    "residual_norm": lambda: tensors((B, T, D), (B, T, D)),
    "block_linear": lambda: tensors((B, T, NH * D), (NH, 3, D)),
    "linear_int8": lambda: [torch.randn(B, T, D), ops.quantize_int8(torch.randn(7, D)), torch.randn(7)],
    "linear_cross_entropy": lambda: [*tensors((B, T, D), (7, D)), torch.randint(7, (B, T))],
    "gated_linear_attention": lambda: [*gated(3), -torch.rand(B, T, NH, D)],
    "gated_scan": lambda: [torch.randn(B, T, D), torch.rand(B, T, D)],
    "selective_scan": lambda: [*tensors((B, T, D)), torch.rand(B, T, D), -torch.rand(D, 3),
                               *tensors((B, T, 3), (B, T, 3), (D,))],
    "wkv": lambda: [*tensors((B, T, D), (B, T, D)), -torch.rand(D), torch.randn(D)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tangent_is_refused(name):
    operator, arguments = getattr(ops, name), OPERATORS[name]()
    operator(*arguments)  # as such the call is a good one
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: operator(x, *arguments[1:]), (arguments[0],), (torch.ones_like(arguments[0]),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        operator(torch.autograd.forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0])), *arguments[1:])
