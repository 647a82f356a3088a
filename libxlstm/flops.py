"""FLOP formulas of the operators for torch.utils.flop_counter.FlopCounterMode, by the definition of train/flops.h: two per
weight of a matrix that a token meets (convolutions and recurrences, too), four per number of a matrix memory (update and read),
two of the forward pass for the backward pass. No chunk size and no recomputation: what an operator is for, however it computes
it. Norms and recurrences of single channels count nothing. Of whole models, the gates of an mLSTM without gradients from 32 tokens
on are multiplied through its projections, which is less by a little than what train/flops.h counts.
"""

import importlib.abc
import importlib.machinery
import math
import sys

import torch

COUNTER = "torch.utils.flop_counter"
BACKWARD = 2  # forward passes


def _memory(q, k, v, *_, **__):
    """(...,NH,DQK), (...,NH,DV): a matrix memory of the mLSTM or of linear attention."""
    return 4 * math.prod(q) * v[-1]


def _slstm(tokens, r):
    """tokens (B,T,...), r (4,NH,DH,DH)."""
    return 2 * math.prod(tokens[:2]) * math.prod(r)


def _conv(x, weight, *_, **__):
    """(...,C), (C,W)."""
    return 2 * math.prod(x) * weight[1]


def _block_linear(x, weight, *_, **__):
    """(...,NB*I), (NB,O,I)."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _step_inputs(x, conv_weight, conv_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, igate_weight, *_, **__):
    """(B,C), (C,W), three of (C/S,S,S) and two of (NH,3C)."""
    weights = [conv_weight, q_weight, k_weight, v_weight, igate_weight, igate_weight]
    return 2 * x[0] * sum(math.prod(weight) for weight in weights)


def _head(x, weight):
    """(...,D), (V,D)."""
    return 2 * math.prod(x) * weight[0]


def _head_and_gradients(x, weight, target, *, need_dx, need_dweight, **_):
    """Gradients of a sum or a mean come with the loss; its backward pass only scales them."""
    return _head(x, weight) * (1 + need_dx + need_dweight)


def _head_backward(grad, x, weight, *_, reduction, **__):
    return BACKWARD * _head(x, weight) if reduction == "none" else 0


def _selective_scan(x, a):
    """(B,T,D), (D,N): a matrix that every token meets; the state counts as vectors."""
    return 2 * math.prod(x) * a[1]


def _nothing(*_, **__):
    return 0


FORMULAS = {
    "mlstm_chunkwise": _memory,
    "mlstm_chunkwise_forward": _memory,
    "mlstm_chunkwise_backward": lambda dh, dc, dn, *forward, **_: BACKWARD * _memory(*forward),
    "mlstm_step": _memory,
    "mlstm_step_inputs": _step_inputs,
    "mlstm_step_lazy": _memory,
    "mlstm_fold": _nothing,  # what mlstm_step_lazy has been counted for
    "slstm": lambda wx, r, *_, **__: _slstm(wx, r),
    "slstm_forward": lambda wx, r, *_, **__: _slstm(wx, r),
    "slstm_backward": lambda dy, dy_last, dc, dn, y, gates, checkpoints, wx, r, *_, **__: BACKWARD * _slstm(y, r),
    "causal_conv1d": _conv,
    "causal_conv1d_step": _conv,
    "causal_conv1d_backward": lambda dy, dstate, *forward, **_: BACKWARD * _conv(*forward),
    "headwise_norm": _nothing,
    "headwise_norm_backward": _nothing,
    "residual_norm": _nothing,
    "residual_norm_backward": _nothing,
    "block_linear": _block_linear,
    "block_linear_backward": lambda dy, *forward, **_: BACKWARD * _block_linear(*forward),
    "quantize_int8": _nothing,
    "dequantize_int8": _nothing,
    "linear_int8": lambda x, weight, *_, **__: _head(x, weight),
    "linear_cross_entropy": lambda x, weight, *_, **__: _head(x, weight),
    "linear_cross_entropy_forward": _head_and_gradients,
    "linear_cross_entropy_backward": _head_backward,
    "wkv": _nothing,
    "wkv_backward": _nothing,
    "selective_scan": lambda x, delta, a, *_, **__: _selective_scan(x, a),
    "selective_scan_backward": lambda dy, dstate, x, delta, a, *_, **__: BACKWARD * _selective_scan(x, a),
    "gated_linear_attention": _memory,
    "gated_linear_attention_backward": lambda dh, dstate, *forward, **_: BACKWARD * _memory(*forward),
    "gated_scan": _nothing,
    "gated_scan_backward": _nothing,
}


def register(counter):
    """counter: torch.utils.flop_counter."""
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.xlstm, name)
        if operator not in counter.flop_registry:  # or the package was loaded a second time
            counter.register_flop_formula(operator)(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Has register() follow the import of the counter, which takes ten times as long as that of this package."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            register(module)
            if self in sys.meta_path:  # a search alone imports nothing
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module
        return spec


def register_on_import():
    """Now, where the counter has been imported, else as soon as it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
