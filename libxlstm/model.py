"""The C++ models as torch.nn.Module."""

import contextlib

import torch


class Model(torch.nn.Module):
    """A language model of the library; load() and make_model() give one.

    Parameters are the C++ model's own tensors, under the names that its checkpoints have for them, so that optimizers,
    state_dict() and load_state_dict(), to(), requires_grad_(), hooks on the model and copy.deepcopy() work as with any
    torch.nn.Module. Its parts (model.blocks ...) hold parameters and compute nothing by themselves; torch.compile leaves
    a call of the model as it is.
    """

    def __init__(self, core):
        """core: a libxlstm._C.Model, which this stands for."""
        super().__init__()
        self._core = core
        self._own = []  # (dictionary, key, tensor) of every parameter
        for name, tensor in core.named_parameters():
            *path, key = name.split(".")
            part = self
            for step in path:
                if step not in part._modules:
                    part.add_module(step, torch.nn.Module())
                part = part._modules[step]
            part._parameters[key] = tensor  # not register_parameter: it takes copies, torch.nn.Parameter, alone
            self._own.append((part._parameters, key, tensor))
        super().train(core.training)

    def forward(self, ids, state=None, reset=None):
        """ids (B,T) int64, T >= 0 -> logits (B,T,V) float32 and the state after the last token, one list of tensors per
        block. state None: before the first token. reset (B,T) bool: the state is empty before that token. A model of numbers
        (model.input_features) takes (B,T,F)."""
        self._check_parameters()
        return self._core(ids, state, reset)

    def loss(self, ids, targets, reset=None, reduction="mean"):
        """Cross entropy in nats of the model's predictions; never holds all logits. Differentiable.

        ids, targets (B,T) int64: targets[b,t] is the token that follows ids[b,t], so both are slices of one (B,T+1) tensor,
        x[:, :-1] and x[:, 1:]; nothing is shifted here. Targets of -100 do not count. reset (B,T) bool: the state is empty
        before that token. reduction "mean": over the targets that count, a scalar (0 where none does); "sum": their sum;
        "none": (B,T), 0 where a target does not count. A model of numbers (model.input_features with vocab_size 1) takes ids
        (B,T,F) and targets (B,T), both float, and gives squared errors; targets of NaN do not count.
        """
        self._check_parameters()
        return self._core.loss(ids, targets, reset, reduction)

    def generate(self, prompt, max_new_tokens=256, temperature=0.8, top_k=0, top_p=1.0, seed=42, stop_token=None,
                 vocab_size=None, on_token=None):
        """The ids that continue one prompt, a list or a tensor (T) or (1,T) of at least one id, drawn as xlstm-generate draws
        them: in constant time and memory per token, without dropout, the same for the same seed on every platform.

        temperature 0: greedy. top_k: from so many of the likeliest, 0: all; top_p: from the likeliest that hold this
        probability. stop_token: the end, which is the last id then. vocab_size: only ids below it, where the model's vocabulary
        is padded. on_token(id) is called with each id at once. Raises libxlstm.Error.
        """
        self._check_parameters()
        ids = torch.as_tensor(prompt)
        if ids.dim() > 2 or ids.dim() == 2 and ids.size(0) != 1:
            raise ValueError(f"prompt: expected one sequence of ids, got the shape {tuple(ids.shape)}")
        stop_token, vocab_size = -1 if stop_token is None else stop_token, vocab_size or 0
        with self._own_stream():
            return self._core.generate(ids.flatten().tolist(), max_new_tokens, temperature, top_k, top_p, seed, stop_token,
                                       vocab_size, on_token)

    def save(self, folder):
        """Writes a checkpoint folder for load() and the programs, tokenizer included. float64 is rounded to float32."""
        self._check_parameters()
        self._core.save(str(folder))

    def train(self, mode=True):
        """Dropout on or off, in the whole model."""
        self._core.train(mode)
        return super().train(mode)

    @property
    def num_parameters(self):
        """How many numbers all parameters have."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def config(self):
        """Every setting of the run that made the model, as YAML."""
        return self._core.config

    @property
    def folder(self):
        """The checkpoint folder, "" for a fresh model."""
        return self._core.folder

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch.nn.Module has it; values are copied into the model's own tensors, so assign=True is an error."""
        if assign:
            raise ValueError("assign=True: values are copied into the tensors of the C++ model, which cannot be replaced")
        return super().load_state_dict(state_dict, strict)

    def _apply(self, fn, recurse=True):
        """What to(), half() and the like do: each tensor stays the same one and changes what it holds."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data = fn(parameter)
                if parameter.grad is not None:
                    parameter.grad.data = fn(parameter.grad)
        return self

    def _own_stream(self):
        """On a GPU, a stream where decoding steps can be recorded, which the default one does not allow."""
        device = next(self.parameters()).device
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def _check_parameters(self):
        """The C++ model would go on with its own tensors and say nothing."""
        for parameters, key, tensor in self._own:
            if parameters.get(key) is not tensor:
                raise RuntimeError(
                    f"{key}: a parameter was replaced (by an assignment, torch.func.functional_call or a parametrization), "
                    "but the C++ model computes with its own tensor; change that in place: parameter.copy_(values) in "
                    "torch.no_grad()"
                )

    def __deepcopy__(self, memo):
        with torch.random.fork_rng(devices=[]):  # it draws weights, which are then overwritten
            copy = Model(self._core.fresh())
        for (_, _, theirs), (_, _, ours) in zip(copy._own, self._own, strict=True):
            theirs.data = ours.detach().clone()
            theirs.requires_grad_(ours.requires_grad)
        memo[id(self)] = copy
        return copy.train(self.training)

    def __reduce_ex__(self, protocol):
        raise TypeError("a model is copied by copy.deepcopy(model), and kept by model.state_dict() or model.save(folder)")

    def __repr__(self):
        return repr(self._core)
