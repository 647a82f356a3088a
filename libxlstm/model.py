"""The C++ models as torch.nn.Module."""

import contextlib
import copy
import json
import numbers

import torch

from .library import load_module


class _Part(torch.nn.Module):
    """Holds parameters of a C++ module."""

    def _apply(self, fn, recurse=True):
        """What to(), half() and the like do: each tensor stays the same one and changes what it holds."""
        for part in self.children() if recurse else ():
            part._apply(fn)
        with torch.no_grad():
            for parameter in self._parameters.values():
                if parameter is None:
                    continue
                parameter.data = fn(parameter)
                if parameter.grad is not None:
                    parameter.grad.data = fn(parameter.grad)
            for key, buffer in self._buffers.items():
                self._buffers[key] = None if buffer is None else fn(buffer)
        return self


class CoreModule(_Part):
    """A C++ module as a torch.nn.Module: what Model and BlockStack share.

    Parameters are the C++ module's own tensors, under the names that its checkpoints have for them, so that optimizers,
    state_dict() and load_state_dict(), to(), requires_grad_(), hooks on the module and copy.deepcopy() work as with any
    torch.nn.Module. Its parts (.blocks ...) hold parameters and compute nothing by themselves; torch.compile leaves a call
    as it is.
    """

    _KEPT = "state_dict()"

    def __init__(self, core):
        """core: what this stands for, of libxlstm._C."""
        super().__init__()
        self._core = core
        self._own = []  # (dictionary, key, tensor) of every parameter
        for name, tensor in core.named_parameters():
            *path, key = name.split(".")
            part = self
            for step in path:
                if step not in part._modules:
                    part.add_module(step, _Part())
                part = part._modules[step]
            tensor._is_param = True  # isinstance(tensor, torch.nn.Parameter), whose constructor takes copies alone
            part.register_parameter(key, tensor)
            self._own.append((part._parameters, key, tensor))
        super().train(core.training)

    def _compute(self, inputs, state, reset, lengths):
        self._check_parameters()
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device="cpu")
        return self._core(inputs, state, reset, lengths)

    def train(self, mode=True):
        """Dropout on or off, in the whole model."""
        self._core.train(mode)
        return super().train(mode)

    @property
    def num_parameters(self):
        """How many numbers all parameters have."""
        return sum(parameter.numel() for parameter in self.parameters())

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch.nn.Module has it; values are copied into the model's own tensors, so assign=True is an error."""
        if assign:
            raise ValueError("assign=True: values are copied into the tensors of the C++ model, which cannot be replaced")
        return super().load_state_dict(state_dict, strict)

    def _check_parameters(self):
        """The C++ model would go on with its own tensors and say nothing."""
        for parameters, key, tensor in self._own:
            if parameters.get(key) is not tensor:
                raise RuntimeError(
                    f"{key}: a parameter was replaced (by an assignment, torch.func.functional_call, torch.export or a "
                    "parametrization), but the C++ model computes with its own tensor; change that in place: "
                    "parameter.copy_(values) in torch.no_grad()"
                )

    def __deepcopy__(self, memo):
        if any(id(tensor) in memo for _, _, tensor in self._own):
            raise RuntimeError("copy.deepcopy: what refers to this module's parameters (an optimizer?) was copied before it, "
                               "to tensors that the copied C++ module does not have; name the module first")
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.random.fork_rng(devices=[]):  # it draws weights, which are then overwritten
            CoreModule.__init__(twin, self._core.fresh())
        for (_, _, theirs), (_, _, ours) in zip(twin._own, self._own, strict=True):
            theirs.data = ours.detach().clone()
            theirs.requires_grad_(ours.requires_grad)
            memo[id(ours)] = theirs
        parts = dict(self.named_modules())
        memo.update({id(parts[name]): part for name, part in twin.named_modules()})
        for key, value in self.__dict__.items():  # hooks, and what a subclass has besides
            if key in ("_parameters", "_modules"):
                twin.__dict__[key].update({name: copy.deepcopy(part, memo) for name, part in value.items()
                                           if name not in twin.__dict__[key]})
            elif key not in ("_core", "_own"):
                twin.__dict__[key] = copy.deepcopy(value, memo)
        return twin.train(self.training)

    def __reduce_ex__(self, protocol):
        raise TypeError(f"it cannot be pickled: it is copied by copy.deepcopy, and kept by {self._KEPT}")

    def extra_repr(self):
        return f"{self._core.describe()}, {self.num_parameters} parameters"

    def __repr__(self):
        return f"{type(self).__name__}({self.extra_repr()})"


class BlockStack(CoreModule):
    """The blocks of an xLSTM, for networks of your own: vectors in, vectors out, as torch.nn.LSTM(batch_first=True) has it.

        stack = libxlstm.BlockStack(embedding_dim=128, num_blocks=4, slstm_at=[1], mlstm={"proj_factor": 1.5})
        y, state = stack(x)                              # x (B,T,128) -> y (B,T,128)
        y, state = stack(more, state)                    # goes on from there

    settings: those of `model` in a configuration, but those of embedding and head: `xlstm-train --help` lists them with their
    defaults. Blocks are residual and a norm follows the last (add_out_norm=False: none); positions that gpt learns and the norm
    in front of rwkv4 to rwkv6 belong to the embedding. First weights are torch's random generator's (torch.manual_seed). Raises
    libxlstm.Error naming the setting that is wrong.
    """

    _ELSEWHERE = ("vocab_size", "input_features", "tie_weights", "embedding_init_std", "output_logit_soft_cap",
                  "add_embedding_dropout", "max_positions")

    def __init__(self, **settings):
        for name in self._ELSEWHERE:
            if name in settings:
                raise TypeError(f"{name}: a setting of embedding or head, which a stack of blocks does not have")
        super().__init__(load_module().make_stack(json.dumps({"model": settings})))  # JSON is YAML, too

    def forward(self, x, state=None, reset=None, lengths=None):
        """x (B,T,D) floating, T >= 0 -> y (B,T,D) and the state after the last token: one list of tensors per block, new ones.

        state None: before the first token. reset (B,T) bool: the state is empty before that token. lengths, a list or tensor
        of B numbers from 1 to T: the sequences have these lengths and padding behind them, which is not read; y is 0 there, and
        the state is the one behind each sequence's own end. Without a state only.

        Gradients go back through the state, too; to cut them, as truncated backpropagation through time does, pass on
        [[tensor.detach() for tensor in block] for block in state].
        """
        return self._compute(x, state, reset, lengths)


class Model(CoreModule):
    """A language model of the library; load() and make_model() give one."""

    _KEPT = "model.state_dict() or model.save(folder)"

    def forward(self, ids, state=None, reset=None, lengths=None):
        """ids (B,T) int64, T >= 0 -> logits (B,T,V) float32 and the state after the last token, one list of tensors per
        block. state None: before the first token. reset (B,T) bool: the state is empty before that token. lengths (B): see
        BlockStack.forward. A model of numbers (model.input_features) takes (B,T,F)."""
        return self._compute(ids, state, reset, lengths)

    def loss(self, ids, targets, reset=None, reduction="mean"):
        """Cross entropy in nats of the model's predictions; never holds all logits. Differentiable.

        ids, targets (B,T) int64: targets[b,t] is the token that follows ids[b,t], so both are slices of one (B,T+1) tensor,
        x[:, :-1] and x[:, 1:]; nothing is shifted here. Targets of -100 do not count. reset (B,T) bool: the state is empty
        before that token. reduction "mean": over the targets that count, a scalar (0 where none does); "sum": their sum;
        "none": (B,T), 0 where a target does not count. A model of numbers (model.input_features with vocab_size 1) takes ids
        (B,T,F) and targets (B,T), both float, and gives squared errors; targets of NaN do not count.
        """
        return self.loss_and_state(ids, targets, None, reset, reduction)[0]

    def loss_and_state(self, ids, targets, state=None, reset=None, reduction="mean"):
        """loss() of sequences that go on from a state, and the state behind them: truncated backpropagation through time.

            state = None
            for ids, targets in pieces:                  # each goes on where the one before ended
                loss, state = model.loss_and_state(ids, targets, state)
                loss.backward()
                state = [[tensor.detach() for tensor in block] for block in state]

        Without detach() the gradient goes back through all pieces, and backward() comes once, behind the last.
        """
        self._check_parameters()
        return self._core.loss_and_state(ids, targets, state, reset, reduction)

    def generate(self, prompt, max_new_tokens=256, temperature=0.8, top_k=0, top_p=1.0, seed=42, stop_token=None,
                 vocab_size=None, on_token=None):
        """The ids that continue a prompt, a list or a tensor (T) of at least one id, as a list; or lists that continue each of
        several prompts of any lengths, a list of such or a tensor (B,T), side by side. Drawn as xlstm-generate draws: in
        constant time and memory per token, without dropout, the same for the same seed on every platform.

        temperature 0: greedy. top_k: from so many of the likeliest, 0: all; top_p: from the likeliest that hold this
        probability. seed: prompt i has seed + i. stop_token: the end, which is the last id then; -1: none. vocab_size: only ids
        below it, where the model's vocabulary is padded. on_token(id), of several prompts on_token(i, id), is called with each
        id at once. Raises libxlstm.Error.
        """
        self._check_parameters()
        prompts = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
        several = any(not isinstance(ids, numbers.Integral) for ids in prompts)
        prompts = [_ids(ids) for ids in (prompts if several else [prompts])]
        if not several and on_token is not None:
            told, on_token = on_token, lambda _, id: told(id)
        for name, value, low in (("max_new_tokens", max_new_tokens, 0), ("seed", seed, 0), ("vocab_size", vocab_size, 1),
                                 ("stop_token", stop_token, -1)):
            absent = value is None and name in ("vocab_size", "stop_token")
            if not absent and not (isinstance(value, numbers.Integral) and value >= low):
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
        stop_token, vocab_size = -1 if stop_token is None else stop_token, vocab_size or 0
        with self._own_stream():
            found = self._core.generate(prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, vocab_size,
                                        on_token)
        return found if several else found[0]

    def save(self, folder):
        """Writes a checkpoint folder for load() and the programs, tokenizer included. float64 is rounded to float32."""
        self._check_parameters()
        self._core.save(str(folder))

    @property
    def config(self):
        """Every setting of the run that made the model, as YAML."""
        return self._core.config

    @property
    def folder(self):
        """The checkpoint folder, "" for a fresh model."""
        return self._core.folder

    def _own_stream(self):
        """On a GPU, a stream where decoding steps can be recorded, which the default one does not allow."""
        device = next(self.parameters()).device
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


def _ids(sequence):
    """One sequence as a list of integers."""
    ids = torch.as_tensor(sequence, device="cpu")
    if ids.dim() != 1 or ids.numel() > 0 and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"prompt: expected ids (T), or several such, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.tolist()
