"""A C++ module as a torch.nn.Module."""

import copy
import copyreg
import operator

import torch
from torch.nn.utils.rnn import PackedSequence

from .library import load_module


class _Part(torch.nn.Module):
    """Holds parameters of a C++ module. Nothing can be put in their place or beside them: the C++ module would not see it."""

    _closed = False  # all it has is there

    def __setattr__(self, name, value):
        if self._closed and name != "training" and not name.startswith("_"):
            _refuse(name)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        _refuse(name)

    def forward(self, *_, **__):
        raise NotImplementedError("a part of this module holds parameters and computes nothing by itself: call the module, "
                                  "whose blocks=[...] gives what is behind single blocks, or Model.hidden() and logits()")


class _PartList(_Part):
    """Parts by number, as in a torch.nn.ModuleList: len(blocks), blocks[0], blocks[-2:], which is a list."""

    def __len__(self):
        return len(self._modules)

    def __getitem__(self, index):
        return list(self._modules.values())[index]


def _refuse(name):
    raise AttributeError(
        f"{name}: a part of this module holds parameters and computes nothing by itself, so that nothing can be put in its "
        "place, added to it or hooked, as FSDP, pruning and parametrizations would. Change parameters in place "
        "(torch.no_grad(); parameter.copy_(values)), and build on Model.hidden(), a BlockStack or torch.ops.xlstm. Tools that "
        "hook every module are to stop at this one: Lightning's ModelSummary(max_depth=1)"
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


_NO_META = ("it stays the C++ module's own tensor, with memory on the CPU or a GPU. Make the model outside of "
            "torch.device(\"meta\") and of accelerate's init_empty_weights(); libxlstm.load() draws no weights and needs neither")
_NOT_MADE_ON_META = f"a parameter cannot be made on meta: {_NO_META}"


class CoreModule(torch.nn.Module):
    """A C++ module as a torch.nn.Module: what Model and BlockStack share.

    Parameters are the C++ module's own tensors, under the names that its checkpoints have for them, so that optimizers,
    state_dict() and load_state_dict(), to(), requires_grad_(), hooks on the module, copy.deepcopy() and pickle work as with
    any torch.nn.Module. Its parts (.blocks ...) hold parameters and compute nothing by themselves; replacing or hooking one is
    an error. torch.compile leaves a call as it is.

    A pickle (torch.save(module), which torch.load reads with weights_only off, multiprocessing, joblib ...) holds settings,
    values, what trains and in which mode, and the tokenizer of a model; no gradients. What refers to its parameters, such as a
    layer that shares one or an optimizer, refers to those of the copy if it is pickled or copied together with the module.
    """

    _of_core = ()  # names of what the C++ module has

    def __init__(self, core):
        """core: what this stands for, of libxlstm._C."""
        super().__init__()
        copyreg.pickle(type(core), _reduce_core)
        if torch.get_default_device().type == "meta":
            raise TypeError(_NOT_MADE_ON_META)
        self._core = core
        # What holds something is None where it is this module: one that refers to itself is not freed when it is dropped.
        self._parts = []  # (module that holds it, its name there, part)
        self._own = []  # (name, part, name in the part, tensor) of every parameter
        for name, tensor in core.named_parameters():
            *path, key = name.split(".")
            part = self
            for step, below in zip(path, [*path[1:], ""]):
                if step not in part._modules:
                    part.add_module(step, _PartList() if below.isdigit() else _Part())
                    self._parts.append((None if part is self else part, step, part._modules[step]))
                part = part._modules[step]
            tensor._is_param = True  # isinstance(tensor, torch.nn.Parameter), whose constructor takes copies alone
            try:
                part.register_parameter(key, tensor)
            except TypeError as error:  # of accelerate's method, which stands in that one's place
                raise TypeError(_NOT_MADE_ON_META) from error
            if part._parameters[key] is not tensor:
                raise TypeError(_NOT_MADE_ON_META)
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
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg="libxlstm's models compute in C++, which fullgraph=True and torch.export do not "
                                          "take: write a torch.nn.Module of torch.ops.xlstm for them")
        self._check_parameters()
        if isinstance(inputs, PackedSequence):
            raise TypeError("ids: expected (B,T), got a PackedSequence; torch.nn.utils.rnn.pad_packed_sequence(packed, "
                            "batch_first=True) gives ids and the lengths=... to call it with")
        if not isinstance(inputs, torch.Tensor):
            inputs = torch.as_tensor(inputs, device=self._own[0][3].device)
        if not inputs.is_floating_point():
            inputs = inputs.long()
        if reset is not None:
            reset = torch.as_tensor(reset, device=inputs.device)
            reset = reset if reset.is_floating_point() else reset.bool()
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device="cpu")
        check_state(state)
        return function(inputs, state, reset, lengths, *more)

    def _check_dtype(self, name, x, part):
        """Of floating x, which autocast may convert: the dtype must be that of a part's parameters."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return
        own = next(tensor.dtype for of, *_, tensor in self._own if of.startswith(part) and tensor.is_floating_point())
        if x.dtype != own:
            raise TypeError(f"{name}: expected {own}, as the parameters are, got {x.dtype}; convert it, or the module by "
                            f".to({x.dtype})")

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
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for *_, tensor in self._own:  # without gradients, as a torch.nn.Parameter is copied
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        state = self.__getstate__()
        twin._restore(copy.deepcopy(state.pop("_core"), memo), state.pop("_modes"))
        for (*_, theirs), (*_, ours) in zip(twin._parts, self._parts, strict=True):
            memo[id(ours)] = theirs
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def __getstate__(self):
        """For pickle: the C++ module, which _reduce_core makes anew, and what a torch.nn.Module has besides."""
        self._check_parameters()
        state = {key: value for key, value in self.__dict__.items() if key not in ("_parts", "_own", "_of_core")}
        for key in ("_parameters", "_modules"):
            state[key] = {name: value for name, value in state[key].items() if name not in self._of_core}
        return {**state, "_modes": [part.training for *_, part in self._parts]}

    def __setstate__(self, state):
        state = dict(state)
        if "_core" in state:
            self._restore(state.pop("_core"), state.pop("_modes"))
        for key, value in state.items():
            if key in ("_parameters", "_modules"):
                self.__dict__[key].update(value)
            else:
                self.__dict__[key] = value

    def _restore(self, core, modes):
        CoreModule.__init__(self, core)
        for (*_, part), mode in zip(self._parts, modes, strict=True):
            part.training = mode

    def extra_repr(self):
        return f"{self._core.describe()}, {self.num_parameters} parameters"

    def __repr__(self):
        return f"{type(self).__name__}({self.extra_repr()})"


def _reduce_core(core):
    """For pickle and copy."""
    return _make_core, (type(core).__name__, core.settings(), core.training, dict(core.named_parameters()))


def _make_core(kind, settings, training, tensors):
    """What _reduce_core was given. The tensors are taken, not copied, and these very objects become its parameters, so that
    what else refers to them (a layer that shares one, an optimizer) refers to its parameters."""
    core = getattr(load_module(), kind).undrawn(*settings)
    own = dict(core.named_parameters())

    def fits(name):
        return tensors[name].shape == own[name].shape or tensors[name].dtype == torch.int8  # quantize()

    if own.keys() != tensors.keys() or not all(map(fits, own)):
        raise RuntimeError("the pickled module has other parameters than one that is made of its settings here: another "
                           "version of libxlstm wrote it; read it there, and pass on its save(folder) or state_dict()")
    for name, tensor in own.items():
        given = tensors[name]
        tensor.requires_grad_(given.requires_grad)  # first: integers require none
        tensor.data = given
        torch._C._swap_tensor_impl(tensor, given)  # the C++ module's tensor goes by the Python object that was given
    core.train(training)
    return core


def _change_in_place(module, fn):
    with torch.no_grad():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            changed = fn(parameter)
            if not torch._has_compatible_shallow_copy_type(parameter, changed):
                raise TypeError(f"a parameter on {parameter.device} cannot become a {changed.layout} tensor on "
                                f"{changed.device}: {_NO_META}")
            parameter.data = changed
            if parameter.grad is not None:
                parameter.grad.data = fn(parameter.grad)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else fn(buffer)


def check_state(state):
    """A TypeError unless it is None or a list of tensors for each block."""
    def is_block(block):
        return not isinstance(block, torch.Tensor) and all(isinstance(tensor, torch.Tensor) for tensor in block)

    try:
        fits = state is None or all(map(is_block, state))
    except TypeError:
        fits = False
    if not fits:
        raise TypeError("state: expected None or what a call returned, a list of tensors for each block")
