"""The C++ models as torch.nn.Module."""

import contextlib
import copy
import numbers
import operator
import os
import tempfile

import torch

from .library import as_yaml, load_module


class _Part(torch.nn.Module):
    """Holds parameters of a C++ module. Nothing can be put in their place or beside them: the C++ module would not see it."""

    _closed = False  # all it has is there

    def __setattr__(self, name, value):
        if self._closed and name != "training" and not name.startswith("_"):
            _refuse(name)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        _refuse(name)

    def __getitem__(self, index):
        """blocks[0], as of a torch.nn.ModuleList."""
        return self._modules[str(range(len(self._modules))[index])]


def _refuse(name):
    raise AttributeError(
        f"{name}: a part of this module holds parameters and computes nothing by itself, so that nothing can be put in its "
        "place, added to it or hooked. Change parameters in place (torch.no_grad(); parameter.copy_(values)), and build on "
        "Model.hidden() or on a BlockStack"
    )


def _only_while_built(name):
    def method(self, *arguments, **options):
        if self._closed:
            _refuse(name)
        return getattr(super(_Part, self), name)(*arguments, **options)

    return method


for _name in ("add_module", "register_module", "register_parameter", "register_buffer", "register_forward_hook",
              "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
    setattr(_Part, _name, _only_while_built(_name))


class CoreModule(torch.nn.Module):
    """A C++ module as a torch.nn.Module: what Model and BlockStack share.

    Parameters are the C++ module's own tensors, under the names that its checkpoints have for them, so that optimizers,
    state_dict() and load_state_dict(), to(), requires_grad_(), hooks on the module, copy.deepcopy() and pickle work as with
    any torch.nn.Module. Its parts (.blocks ...) hold parameters and compute nothing by themselves; replacing or hooking one is
    an error. torch.compile leaves a call as it is.

    A pickle (torch.save(module), which torch.load reads with weights_only off, multiprocessing, joblib ...) holds settings,
    values, what trains and in which mode, and the tokenizer of a model; no gradients. An optimizer that is pickled beside the
    module does not come back as that of its copy: make one of the copy's parameters and give it the other's state_dict().
    """

    _of_core = ()  # names of what the C++ module has

    def __init__(self, core):
        """core: what this stands for, of libxlstm._C."""
        super().__init__()
        self._core = core
        # What holds something is None where it is this module: one that refers to itself is not freed when it is dropped.
        self._parts = []  # (module that holds it, its name there, part)
        self._own = []  # (name, part, name in the part, tensor) of every parameter
        for name, tensor in core.named_parameters():
            *path, key = name.split(".")
            part = self
            for step in path:
                if step not in part._modules:
                    part.add_module(step, _Part())
                    self._parts.append((None if part is self else part, step, part._modules[step]))
                part = part._modules[step]
            tensor._is_param = True  # isinstance(tensor, torch.nn.Parameter), whose constructor takes copies alone
            part.register_parameter(key, tensor)
            self._own.append((name, None if part is self else part, key, tensor))
        for _, _, part in self._parts:
            part._closed = True
        self._of_core = {name.split(".")[0] for name, *_ in self._own}
        super().train(core.training)

    def __setattr__(self, name, value):
        if name in self._of_core:
            _refuse(name)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        if name in self._of_core:
            _refuse(name)
        super().__delattr__(name)

    def _apply(self, fn, recurse=True):
        """What to(), half() and the like do: each tensor stays the same one and changes what it holds."""
        _change_in_place(self, fn)
        if recurse:
            for _, _, part in self._parts:
                _change_in_place(part, fn)
            for name, module in self._modules.items():  # what a subclass has besides
                if name not in self._of_core:
                    module._apply(fn)
        return self

    def _call(self, function, inputs, state, reset, lengths, *more):
        """function of the core, of arguments as they may come."""
        self._check_parameters()
        if not isinstance(inputs, torch.Tensor):
            inputs = torch.as_tensor(inputs, device=self._own[0][3].device)
        if not inputs.is_floating_point():
            inputs = inputs.long()
        if reset is not None:
            reset = torch.as_tensor(reset, device=inputs.device)
            reset = reset if reset.is_floating_point() else reset.bool()
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device="cpu")
        if state is not None and not _is_state(state):
            raise TypeError("state: expected None or what a call returned, a list of tensors for each block")
        return function(inputs, state, reset, lengths, *more)

    def _call_with_blocks(self, function, blocks, *given):
        """The same of a function that also gives the vectors behind single blocks, where they are wanted."""
        if blocks is None:
            return self._call(function, *given, [])[:2]
        count = len(self.blocks._modules)
        positions = [operator.index(block) for block in blocks]
        for position in positions:
            if not -count <= position < count:
                raise IndexError(f"blocks: expected positions from {-count} to {count - 1}, got {position}")
        return self._call(function, *given, [position % count for position in positions])

    def train(self, mode=True):
        """Dropout on or off, in the whole model."""
        self._core.train(mode)
        return super().train(mode)

    def quantize(self):
        """Rounds the matrices of linear maps to 8 bits, row by row (torch.ops.xlstm.quantize_int8), and the rest to bfloat16, in
        place: for generation in about half the memory and time that bfloat16 takes. Gates, small matrices, embedding and head
        are of the rest, and .float() takes it back to float32. Gradients reach the inputs and what is not in 8 bits. The
        matrices are int8 parameters that hold their rows' scales, so that averages of parameters() are no averages of them."""
        self._check_parameters()
        for parameter in self.parameters():
            parameter.grad = None
        self._core.quantize()
        return self

    @property
    def num_parameters(self):
        """How many numbers all parameters have; of matrices of 8 bits how many bytes."""
        return sum(parameter.numel() for parameter in self.parameters())

    def param_groups(self, weight_decay=0.1, of_embedding=False):
        """For torch.optim.AdamW(model.param_groups()): the matrices decay, norms, biases and recurrent weights do not, and the
        embedding where it is wanted; what xlstm-train does. What a subclass has besides does not."""
        decay = load_module().decays
        decaying = {id(tensor) for name, _, _, tensor in self._own if decay(name, tensor, of_embedding)}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [[p for p in trained if (id(p) in decaying) is wanted] for wanted in (True, False)]
        return [{"params": params, "weight_decay": rate} for params, rate in zip(groups, (weight_decay, 0.0)) if params]

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch.nn.Module has it; values are copied into the model's own tensors, so assign=True is an error."""
        if assign:
            raise ValueError("assign=True: values are copied into the tensors of the C++ model, which cannot be replaced")
        return super().load_state_dict(state_dict, strict)

    def _check_parameters(self):
        """The C++ model would go on with its own tensors and say nothing."""
        for owner, name, part in self._parts:
            if (self if owner is None else owner)._modules.get(name) is not part:
                raise RuntimeError(f"{name}: a part was replaced, but the C++ model computes with its own; build on "
                                   "Model.hidden() or on a BlockStack")
        for name, part, key, tensor in self._own:
            if (self if part is None else part)._parameters.get(key) is not tensor:
                raise RuntimeError(
                    f"{name}: a parameter was replaced (by an assignment, torch.func.functional_call, torch.export or a "
                    "parametrization), but the C++ model computes with its own tensor; change that in place: "
                    "parameter.copy_(values) in torch.no_grad()"
                )

    def __copy__(self):
        """Another object for the same module: parts, tensors and mode are shared, as by any torch.nn.Module's copy.copy."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo):
        if any(id(tensor) in memo for *_, tensor in self._own):
            raise RuntimeError("copy.deepcopy: what refers to this module's parameters (an optimizer?) was copied before it, "
                               "to tensors that the copied C++ module does not have; name the module first")
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__getstate__()
        core = state.pop("_core")
        twin._restore(**{**core, "tensors": {name: tensor.clone() for name, tensor in core["tensors"].items()}})
        for (*_, theirs), (*_, ours) in zip([*twin._own, *twin._parts], [*self._own, *self._parts], strict=True):
            memo[id(ours)] = theirs
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def __getstate__(self):
        """For pickle: what makes the C++ module anew, as _core, and what a torch.nn.Module has besides."""
        self._check_parameters()
        state = {key: value for key, value in self.__dict__.items() if key not in ("_parts", "_own", "_of_core")}
        for key in ("_parameters", "_modules"):
            state[key] = {name: value for name, value in state[key].items() if name not in self._of_core}
        state["_core"] = {
            "kind": type(self._core).__name__, "settings": self._core.settings(), "training": self._core.training,
            "tensors": {name: tensor.detach() for name, *_, tensor in self._own},
            "trained": [tensor.requires_grad for *_, tensor in self._own],
            "modes": [part.training for *_, part in self._parts],
        }
        return state

    def __setstate__(self, state):
        state = dict(state)
        core = state.pop("_core", None)
        if core is not None:
            self._restore(**core)
        for key, value in state.items():
            if key in ("_parameters", "_modules"):
                self.__dict__[key].update(value)
            else:
                self.__dict__[key] = value

    def _restore(self, kind, settings, training, tensors, trained, modes):
        """Makes what __getstate__ calls _core. The tensors are taken, not copied."""
        CoreModule.__init__(self, getattr(load_module(), kind).undrawn(*settings))

        def fits(name, ours):
            return name in tensors and (tensors[name].shape == ours.shape or tensors[name].dtype == torch.int8)  # quantize()

        if len(tensors) != len(self._own) or not all(fits(name, tensor) for name, *_, tensor in self._own):
            raise RuntimeError("the pickled module has other parameters than one that is made of its settings here: another "
                               "version of libxlstm wrote it; read it there, and pass on its save(folder) or state_dict()")
        for (name, _, _, tensor), trains in zip(self._own, trained, strict=True):
            tensor.requires_grad_(trains)  # first: integers require none
            tensor.data = tensors[name]
        for (*_, part), mode in zip(self._parts, modes, strict=True):
            part.training = mode
        self._core.train(training)

    def extra_repr(self):
        return f"{self._core.describe()}, {self.num_parameters} parameters"

    def __repr__(self):
        return f"{type(self).__name__}({self.extra_repr()})"


def _change_in_place(module, fn):
    with torch.no_grad():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            parameter.data = fn(parameter)
            if parameter.grad is not None:
                parameter.grad.data = fn(parameter.grad)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else fn(buffer)


def _is_state(state):
    try:
        return all(isinstance(tensor, torch.Tensor) for block in state for tensor in block)
    except TypeError:
        return False


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
        super().__init__(load_module().make_stack(as_yaml({"model": settings})))

    def forward(self, x, state=None, reset=None, lengths=None, blocks=None):
        """x (B,T,D) floating, T >= 0 -> y (B,T,D) and the state after the last token: one list of tensors per block, new ones.

        state None: before the first token. reset (B,T) bool: the state is empty before that token. lengths, a list or tensor
        of B numbers from 1 to T: the sequences have these lengths and padding behind them, which is not read; y is 0 there, and
        the state is the one behind each sequence's own end. Without a state only.

        Gradients go back through the state, too; to cut them, as truncated backpropagation through time does, pass on
        [[tensor.detach() for tensor in block] for block in state].

        blocks, positions as Python counts them: a list of the residual stream (B,T,D) behind each of these blocks, before
        the last norm, comes third: y, state, (first, last) = stack(x, blocks=[0, -1]).
        """
        own = next(tensor.dtype for *_, tensor in self._own if tensor.is_floating_point())
        other = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != own
        if other and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected {own}, as the parameters are, got {x.dtype}; convert x, or the stack by .to({x.dtype})")
        return self._call_with_blocks(self._core, blocks, x, state, reset, lengths)


class Model(CoreModule):
    """A language model of the library; load() and make_model() give one."""

    _tokenizer = None

    def forward(self, ids, state=None, reset=None, lengths=None, targets=None, reduction="mean"):
        """ids (B,T) int64, T >= 0 -> logits (B,T,V) float32 and the state after the last token, one list of tensors per
        block. state None: before the first token. reset (B,T) bool: the state is empty before that token. lengths (B): see
        BlockStack.forward. A model of numbers (model.input_features) takes (B,T,F).

        With targets (B,T) the loss stands in place of the logits, which are then never held all at once: see loss(). That is
        how a model in DistributedDataParallel is trained, and how truncated backpropagation through time goes:

            state = None
            for ids, targets in pieces:                  # each goes on where the one before ended
                loss, state = model(ids, state, targets=targets)
                loss.backward()
                state = [[tensor.detach() for tensor in block] for block in state]
        """
        return self._call(self._core, ids, state, reset, lengths, targets, reduction)

    def loss(self, ids, targets, reset=None, reduction="mean"):
        """Cross entropy in nats of the model's predictions; never holds all logits. Differentiable.

        ids, targets (B,T) int64: targets[b,t] is the token that follows ids[b,t], so both are slices of one (B,T+1) tensor,
        x[:, :-1] and x[:, 1:]; nothing is shifted here. Targets of -100 do not count. reset (B,T) bool: the state is empty
        before that token. reduction "mean": over the targets that count, a scalar (0 where none does); "sum": their sum;
        "none": (B,T), 0 where a target does not count. A model of numbers (model.input_features with vocab_size 1) takes ids
        (B,T,F) and targets (B,T), both float, and gives squared errors; targets of NaN do not count.

        Hooks and DistributedDataParallel do not see this call; they see model(ids, targets=targets)[0], which is the same and
        holds the states meanwhile.
        """
        return self._call(lambda ids, _, reset, __: self._core.loss(ids, targets, reset, reduction), ids, None, reset, None)

    def hidden(self, ids=None, state=None, reset=None, lengths=None, embeddings=None, blocks=None):
        """The vectors (B,T,D) behind the last norm, which the head reads, and the state: for heads, probes and losses of your
        own; logits(y) goes on from there. Of ids (B,T), or of embeddings (B,T,D) in place of embed(ids): prompts that are
        learned, or vectors from elsewhere. The rest as in forward().

        blocks, positions as Python counts them: a list of the residual stream (B,T,D) behind each of these blocks comes third,

            y, state, (first, last) = model.hidden(ids, blocks=[0, -1])
        """
        if (ids is None) == (embeddings is None):
            raise TypeError("hidden: expected either ids or embeddings")
        inputs, embedded = (ids, False) if embeddings is None else (embeddings, True)
        return self._call_with_blocks(
            lambda *given: self._core.hidden(embedded, *given), blocks, inputs, state, reset, lengths)

    def embed(self, ids):
        """ids (B,T) -> (B,T,D): what hidden() takes as embeddings."""
        self._check_parameters()
        return self._core.embed(ids)

    def logits(self, hidden):
        """hidden (...,D) -> (...,V), float32 or float64."""
        self._check_parameters()
        return self._core.logits(hidden)

    def generate(self, prompt, max_new_tokens=256, temperature=0.8, top_k=0, top_p=1.0, seed=42, stop_token=None,
                 vocab_size=None, on_token=None):
        """The ids that continue a prompt, a list or a tensor (T) of at least one id, as a list; or lists that continue each of
        several prompts of any lengths, a list of such or a tensor (B,T), side by side. Drawn as xlstm-generate draws: in
        constant time and memory per token, without dropout, the same for the same seed on every platform. Side by side rounds
        otherwise than one by one, which in bfloat16 and with weights of 8 bits may let texts part.

        temperature 0: greedy. top_k: from so many of the likeliest, 0: all; top_p: from the likeliest that hold this
        probability. seed: prompt i has seed + i. stop_token: the end, which is the last id then; -1: none. vocab_size: only ids
        below it, where the model's vocabulary is padded. Where they are not given they are those of self.tokenizer, if there is
        one. on_token(id), of several prompts on_token(i, id), is called with each
        id at once. Raises libxlstm.Error.
        """
        self._check_parameters()
        prompts = prompt.tolist() if isinstance(prompt, torch.Tensor) else [prompt] if isinstance(prompt, str) else list(prompt)
        several = any(not isinstance(ids, numbers.Integral) for ids in prompts)
        prompts = [_ids(ids) for ids in (prompts if several else [prompts])]
        if not several and on_token is not None:
            told, on_token = on_token, lambda _, id: told(id)
        for name, value, low in (("max_new_tokens", max_new_tokens, 0), ("seed", seed, 0), ("vocab_size", vocab_size, 1),
                                 ("stop_token", stop_token, -1)):
            absent = value is None and name in ("vocab_size", "stop_token")
            if not absent and not (isinstance(value, numbers.Integral) and value >= low):
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
        if None in (stop_token, vocab_size) and self.tokenizer is not None:
            stop_token = self.tokenizer.eos_id if stop_token is None else stop_token
            vocab_size = self.tokenizer.vocab_size if vocab_size is None else vocab_size
        stop_token, vocab_size = -1 if stop_token is None else stop_token, vocab_size or 0
        with self._own_stream():
            found = self._core.generate(prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, vocab_size,
                                        on_token)
        return found if several else found[0]

    def merge_lora(self):
        """A new Model without adapters that computes the same: they are part of its weights. All its parameters are trained.
        What a subclass has besides is not in it."""
        self._check_parameters()
        if not any(name.endswith("lora_a") for name, *_ in self._own):
            raise ValueError("merge_lora: the model has no adapters (model.lora.rank)")
        merged = Model(self._core.merge_lora())
        merged._tokenizer = self._tokenizer
        return merged.train(self.training)

    def save(self, folder):
        """Writes a checkpoint folder for load() and the programs, tokenizer included. float64 is rounded to float32. A model that
        is there is kept until the new one is whole."""
        self._check_parameters()
        with self._tokenizer_files() as tokenizer:
            self._core.save(str(folder), tokenizer)

    @contextlib.contextmanager
    def _tokenizer_files(self):
        """Where they are: those of a model that came as a pickle may not be where they were."""
        *_, spec = self._core.settings()
        if self._tokenizer is None or self._tokenizer.spec == "bytes" or os.path.exists(spec):
            yield spec
            return
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save(os.path.join(folder, "tokenizer.json"))
            yield folder

    def __reduce_ex__(self, protocol):
        with contextlib.suppress(ValueError):  # where it cannot be read, it cannot by the copy, which says why
            _ = self.tokenizer  # is kept, since its files may be out of the copy's reach
        return super().__reduce_ex__(protocol)

    @property
    def tokenizer(self):
        """libxlstm.scoring.Tokenizer of the text that the model was trained with, for encode() and decode(); None for a fresh
        model that was not given one, and for models of tasks."""
        if self._tokenizer is None and self._core.tokenizer:
            from .scoring import Tokenizer

            self._tokenizer = Tokenizer(self._core.tokenizer)
        return self._tokenizer

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
    if isinstance(sequence, str):
        raise ValueError("prompt: expected ids, got text; model.tokenizer.encode(text) gives them")
    ids = torch.as_tensor(sequence, device="cpu")
    if ids.dim() != 1 or ids.numel() > 0 and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"prompt: expected ids (T), or several such, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.tolist()
