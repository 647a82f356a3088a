"""What the stand-ins of several packages share."""

import functools

import torch
from torch import nn


class Cell:
    """Base of all: derives, before the package's class, what is to take its place."""

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.THEIRS = cls.__bases__[-1]

    @staticmethod
    def why_not(module):
        """What about a module of theirs is not covered, None if nothing."""
        return None


def untouched(module, kind):
    """Whether to compute for `module` without calling it makes no difference: nothing wraps it, replaced it or listens."""
    listeners = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(listeners) and "forward" not in vars(module)


def recording(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def promoted(x, *others):
    """x in the dtype that arithmetic with the others gives."""
    return x.to(functools.reduce(torch.promote_types, (other.dtype for other in others if other is not None), x.dtype))


def mlstm(q, k, v, igate, fgate, states, eps, scale=None):
    """mLSTM over tokens, (B,T,NH,D) and gates (B,T,NH), from states (c, n, m) in any floating dtype or None: h, (c, n, m).

    As operators have them: m (B,NH). What is given stays as it is, what is returned is float32 (float64 for float64).
    """
    q, k, v = promoted(q, k, v), promoted(k, q, v), promoted(v, q, k)
    learning = recording(q, k, v, igate, fgate)
    if states is None:
        states = None, None, None
    else:
        one_step = q.shape[1] == 1 and not learning
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # Copies: a step writes them, and callers write new states over those that a backward pass is to read.
        states = [state.to(dtype, copy=one_step or learning) for state in states]
        if one_step:
            inputs = (x[:, 0] for x in (q, k, v, igate, fgate))
            return torch.ops.xlstm.mlstm_step(*inputs, *states, eps=eps, scale=scale)[:, None], states
    h, *states = torch.ops.xlstm.mlstm_chunkwise(q, k, v, igate, fgate, *states, eps=eps, scale=scale)
    return h, states


# ---- The 7B model's block, in the xlstm package and in transformers ----------------------------------------------------------


class LargeBackend(Cell):
    """One mLSTM in place of kernels for training, prefilling and steps."""

    @staticmethod
    def why_not(module):
        kernel = module.config.chunkwise_kernel
        return f"chunkwise_kernel {kernel}, whose input gate is a sigmoid" if "siging" in kernel else None

    def _run(self, inputs, states, return_last_states, mode):
        """inputs: q, k, v (B,NH,T,D), gates (B,NH,T); states: c, n, m (B,NH,1), or three None. As forward() of theirs."""
        config = self.config
        mode = config.mode if mode is None else mode
        if "train" in mode:
            wanted = config.return_last_states if return_last_states is None else return_last_states
        elif "inference" in mode:
            wanted = True
        else:
            raise ValueError(f"mode: expected train, train_with_padding or inference, got {mode!r}")
        c, n, m = states
        q = inputs[0]
        h, last = mlstm(*(x.transpose(1, 2) for x in inputs), None if c is None else (c, n, m.squeeze(-1)), config.eps)
        h = h.transpose(1, 2)
        if not wanted:
            return h
        # In the dtype of theirs, which caches take over.
        if q.shape[2] == 1 and "inference" in mode:
            dtype = getattr(torch, config.inference_state_dtype)
        else:
            dtype = q.dtype if "native" in config.chunkwise_kernel else torch.float32
        c, n, m = (state.to(dtype) for state in last)
        return h, (c, n, m.unsqueeze(-1))


class RmsNorm(Cell):
    def forward(self, x):
        x = promoted(x, self.weight, self.bias).unsqueeze(-2)
        return torch.ops.xlstm.headwise_norm(x, self.weight, self.bias, eps=self.eps, kind="rms")


class LargeHeadNorm(Cell):
    def forward(self, x):
        if x.shape[2:] != (self.num_heads, self.head_dim):
            return super().forward(x)  # which says what is wrong
        return torch.ops.xlstm.headwise_norm(promoted(x, self.weight, self.bias), self.weight, self.bias, eps=self.eps)


class LargeLayer(Cell):
    """Norm of the heads and output gate as one; HEAD_NORM is what stands in for that norm."""

    def forward(self, x, state=None):
        norm, config = self.multihead_norm, self.config
        if not (untouched(norm, self.HEAD_NORM) and untouched(self.ogate_act_fn, nn.Sigmoid)):
            return super().forward(x, state)
        if config.weight_mode == "single":
            q, k, v, gate = self.q(x), self.k(x), self.v(x), self.ogate_preact(x)
            igate, fgate = self.igate_preact(x), self.fgate_preact(x)
        else:
            q, k, v, gate = self.qkv_opreact(x).split([self.qk_dim, self.qk_dim, self.v_dim, self.v_dim], -1)
            igate, fgate = self.ifgate_preact(x).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        igate, fgate = (soft_cap(part, config.gate_soft_cap).transpose(1, 2) for part in (igate, fgate))
        h, state = self.mlstm_backend(q, k, v, igate, fgate, *((None, None, None) if state is None else state))
        h = h.transpose(1, 2)
        if not torch.is_autocast_enabled(h.device.type):  # else the projection takes any dtype
            h = promoted(h, norm.weight, norm.bias, gate)
        h = torch.ops.xlstm.headwise_norm(
            h, norm.weight, norm.bias, gate=gate, eps=norm.eps, kind="layer", gate_activation="sigmoid")
        return self.out_proj(h), state


def soft_cap(x, cap):
    return x if cap is None else cap * torch.tanh(x / cap)
