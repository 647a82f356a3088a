"""Stand-ins for the xlstm package's small models, xLSTMLMModel and xLSTMBlockStack."""

import torch
from torch import nn
from xlstm.blocks.mlstm import backends, layer
from xlstm.blocks.mlstm import cell as mlstm_cell
from xlstm.blocks.slstm import cell as slstm_cell
from xlstm.components import conv, linear_headwise, ln

from . import cells


class LinearHeadwiseExpand(cells.Cell, linear_headwise.LinearHeadwiseExpand):
    def forward(self, x):
        return torch.ops.xlstm.block_linear(x, self.weight, self.bias)


class MultiHeadLayerNorm(cells.Cell, ln.MultiHeadLayerNorm):
    def forward(self, input):
        x = input.transpose(1, 2)  # (B,T,NH,DH)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.float()  # as torch does with a group norm
        y = torch.ops.xlstm.headwise_norm(x, self.weight_proxy, self.bias, eps=self.eps)
        return y.unflatten(-1, x.shape[2:]).transpose(1, 2)


class CausalConv1d(cells.Cell, conv.CausalConv1d):
    @staticmethod
    def why_not(module):
        config = module.config
        if config.channel_mixing:
            return "channel_mixing"
        if not 2 <= config.kernel_size <= 8:
            return f"kernel_size {config.kernel_size}, expected 2 to 8"
        return f"conv1d_kwargs {config.conv1d_kwargs}" if config.conv1d_kwargs else None

    def weights(self):
        """As the operators take them; None where the inner convolution is wrapped or hooked."""
        return (self.conv.weight.squeeze(1), self.conv.bias) if cells.untouched(self.conv, nn.Conv1d) else None

    def forward(self, x, conv_state=None, return_last_state=False):
        weights, autocast = self.weights(), torch.is_autocast_enabled(x.device.type)
        if conv_state is not None:
            covered = conv_state.shape[1] == self.pad and conv_state.dtype == x.dtype
        else:
            covered = not return_last_state or x.shape[1] >= self.pad  # theirs returns what there is
        if weights is None or not covered or (autocast and (conv_state is not None or return_last_state)):
            return super().forward(x, conv_state, return_last_state)
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y, last = torch.ops.xlstm.causal_conv1d(x, *weights, conv_state)
        return (y, last) if return_last_state else y

    def step(self, x, conv_state=None):
        weights = self.weights()
        if weights is None or conv_state is None or conv_state[0].dtype != x.dtype or cells.recording(x, *weights, *conv_state):
            return super().step(x, conv_state)
        # Their state has the token itself, too, and is written in place: what follows the oldest is the operator's window.
        (state,) = conv_state
        state[:, 0] = state[:, 1]
        return torch.ops.xlstm.causal_conv1d_step(x[:, 0], *weights, state[:, 1:])[:, None], (state,)


class mLSTMCell(cells.Cell, mlstm_cell.mLSTMCell):
    EPS = 1e-6  # the default of their backends

    @staticmethod
    def why_not(module):
        theirs = module.backend_fn is backends.parallel_stabilized_simple
        steps = module.backend_fn_step is backends.recurrent_step_stabilized_simple
        return None if theirs and steps else "a backend function other than the package's own"

    def _parts(self, q, k, v):
        """(B,T,NH,DH) each, and the gates (B,T,NH)."""
        qkv = torch.cat([q, k, v], -1)
        return (*(x.unflatten(-1, (self.config.num_heads, -1)) for x in (q, k, v)), self.igate(qkv), self.fgate(qkv))

    def hidden(self, q, k, v):
        """h (B,T,NH,DH), before the norm."""
        return cells.mlstm(*self._parts(q, k, v), None, self.EPS)[0]

    def hidden_step(self, q, k, v, mlstm_state=None):
        """h (B,1,NH,DH), before the norm, and the new states in their form: keys are scaled there, not queries."""
        q, k, v, igate, fgate = self._parts(q, k, v)
        if mlstm_state is not None:
            c, n, m = (state.to(q.device, q.dtype) for state in mlstm_state)
            mlstm_state = c, n.squeeze(-1), m.flatten(1)
        h, (c, n, m) = cells.mlstm(q, k * k.shape[-1] ** -0.5, v, igate, fgate, mlstm_state, self.EPS, scale=1.0)
        return h, tuple(state.to(q.dtype) for state in (c, n.unsqueeze(-1), m[:, :, None, None]))

    def _normed(self, h):
        return self.outnorm(h.transpose(1, 2)).transpose(1, 2).flatten(2)

    def forward(self, q, k, v, **kwargs):
        return self._normed(self.hidden(q, k, v))

    def step(self, q, k, v, mlstm_state=None, **kwargs):
        if q.shape[1] != 1:
            return super().step(q, k, v, mlstm_state)  # which says what is wrong
        h, mlstm_state = self.hidden_step(q, k, v, mlstm_state)
        return self._normed(h), mlstm_state


class mLSTMLayer(cells.Cell, layer.mLSTMLayer):
    """Convolution and SiLU as one, and norm, skip and gate."""

    def _as_one(self):
        conv1d, inner = self.conv1d, self.mlstm_cell
        parts = ((conv1d, CausalConv1d), (inner, mLSTMCell), (self.conv_act_fn, nn.SiLU), (self.ogate_act_fn, nn.SiLU))
        return (all(cells.untouched(*part) for part in parts) and cells.untouched(inner.outnorm, MultiHeadLayerNorm)
                and conv1d.weights() is not None)

    def _result(self, h, skip, gate):
        norm = self.mlstm_cell.outnorm
        y = torch.ops.xlstm.headwise_norm(
            h, norm.weight_proxy, norm.bias, skip, self.learnable_skip, gate, eps=norm.eps, gate_activation="silu")
        return self.dropout(self.proj_down(y))

    def forward(self, x, **kwargs):
        if not self._as_one():
            return super().forward(x, **kwargs)
        x, gate = self.proj_up(x).chunk(2, -1)
        convolved = torch.ops.xlstm.causal_conv1d(x, *self.conv1d.weights(), silu=True)[0]
        h = self.mlstm_cell.hidden(self.q_proj(convolved), self.k_proj(convolved), self.v_proj(x))
        return self._result(h, convolved, gate)

    def step(self, x, mlstm_state=None, conv_state=None):
        if x.shape[1] != 1 or not self._as_one():
            return super().step(x, mlstm_state, conv_state)
        x, gate = self.proj_up(x).chunk(2, -1)
        convolved, conv_state = self.conv1d.step(x, conv_state)
        convolved = self.conv_act_fn(convolved)
        h, mlstm_state = self.mlstm_cell.hidden_step(
            self.q_proj(convolved), self.k_proj(convolved), self.v_proj(x), mlstm_state)
        return self._result(h, convolved, gate), {"mlstm_state": mlstm_state, "conv_state": conv_state}


class Slstm(cells.Cell):
    """The gates' slots are those of the cell, i, f, z, o: that their layer feeds the slot i from `fgate` is its own affair."""

    def _weights(self):
        """Recurrent weights (4,NH,DH_out,DH_in) and bias (4,NH,DH)."""
        raise NotImplementedError

    def _run(self, wx, r, b, states):
        """y (B,T,NH,DH) and the states, from (2 or 4,B,H) or None."""
        if states is not None:
            dtype = torch.float64 if wx.dtype == torch.float64 else torch.float32
            states = list(states.to(dtype).unflatten(-1, wx.shape[3:]))
            if len(states) == 4:  # of an empty state they ignore m
                states[3] = states[3].masked_fill(states[2] == 0, -torch.inf)
        y, *last = torch.ops.xlstm.slstm(wx, r, b, *(states or ()), cell=self.config.function,
                                         recurrent_cut=self._recurrent_cut())
        return y, torch.stack(last[: self.config.num_states]).flatten(2)

    def _recurrent_cut(self):
        return False

    def _gates(self, input):
        self._check_input(input)
        x = input.transpose(0, 1) if self.config.input_shape == "SBGNH" else input
        return x.unflatten(-1, (self.config.num_gates, self.config.num_heads, -1))

    def _output(self, y):
        return self._permute_output(y.transpose(0, 1).flatten(2))

    def forward(self, input, state=None, lengths=None):
        y, last = self._run(self._gates(input), *self._weights(), state)
        return self._output(y).to(input.dtype), last.to(input.dtype)


class sLSTMCell_vanilla(Slstm, slstm_cell.sLSTMCell_vanilla):
    def _weights(self):
        sizes = self.config.num_gates, self.config.num_heads, self.config.head_dim
        kernel = self._recurrent_kernel.unflatten(1, (sizes[0], -1))  # (NH,4,out,in)
        return kernel.transpose(0, 1), self._bias.view(sizes)


class sLSTMCell_cuda(Slstm, slstm_cell.sLSTMCell_cuda):
    """Inputs and weights in the dtypes that the configuration gives its kernels; the states are more exact than theirs."""

    @staticmethod
    def why_not(module):
        clip = module.config.gradient_recurrent_clipval
        return None if clip is None else f"gradient_recurrent_clipval {clip}, with which its kernels bound y, too"

    def _weights(self):
        sizes = self.config.num_heads, self.config.num_gates, self.config.head_dim
        kernel = self._recurrent_kernel.unflatten(-1, sizes[1:])  # (NH,in,4,out)
        return kernel.permute(2, 0, 3, 1), self._bias.view(sizes).transpose(0, 1)

    def _recurrent_cut(self):
        return self.config.gradient_recurrent_cut

    def forward(self, input, state=None, lengths=None):
        config, (r, b) = self.config, self._weights()
        wx, dtype = self._gates(input), input.dtype
        if config.enable_automatic_mixed_precision:
            wx, r, b = wx.to(config.torch_dtype_w), r.to(config.torch_dtype_r), b.to(config.torch_dtype_b)
            if torch.is_autocast_enabled():
                dtype = config.torch_dtype_s
        r, b = (x if x.dtype == wx.dtype else x.float() for x in (r, b))
        with torch.autocast(input.device.type, enabled=False):  # the dtypes are given
            y, last = self._run(wx, r, b, state)
        return self._output(y).to(dtype), last.to(dtype)


CELLS = {
    cell.THEIRS: cell
    for cell in (LinearHeadwiseExpand, MultiHeadLayerNorm, CausalConv1d, mLSTMCell, mLSTMLayer, sLSTMCell_vanilla,
                 sLSTMCell_cuda)
}
