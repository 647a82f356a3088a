"""What the converters share: configurations of which every key is accounted for, tensors each of which is taken once, and the
models and folders of an export."""

import contextlib
import os
import shutil

EXIT_CONFIG, EXIT_WEIGHTS = 2, 4


class ConvertError(Exception):
    """One line for people, and the exit status of the programs."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Section:
    """One mapping of a configuration. Every key must be asked for or be among those without effect, `ignored`."""

    def __init__(self, values, ignored, place):
        if not isinstance(values, dict):
            raise ConvertError(EXIT_CONFIG, f"{place}: expected a mapping, got {values!r}")
        # A leading underscore marks what a program computes or notes itself.
        self._values = {key: value for key, value in values.items() if not str(key).startswith("_")}
        self._ignored, self._place = ignored, place

    def take(self, key, default=None, choices=None):
        value = self._values.pop(key, default)
        if choices is not None and value not in choices:
            expected = ", ".join(map(str, choices))
            raise ConvertError(EXIT_CONFIG, f"{self._place}.{key}: {value!r} cannot be imported, expected: {expected}")
        return value

    def number(self, key, default, kind=int):
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ConvertError(EXIT_CONFIG, f"{self._place}.{key}: expected a number, got {value!r}")
        return kind(value)

    def flag(self, key, default):
        return self.take(key, default, choices=(True, False))

    def section(self, key, ignored):
        """The mapping below `key`; None where it is absent or null."""
        values = self._values.pop(key, None)
        return None if values is None else Section(values, ignored, f"{self._place}.{key}")

    def finish(self, hint=""):
        unknown = sorted(str(key) for key in self._values if key not in self._ignored)
        if unknown:
            raise ConvertError(EXIT_CONFIG, f"{self._place}: unknown keys {', '.join(unknown)}{hint}")


class Weights:
    """A state_dict that is consumed: each tensor is taken once, as it is, with its shape checked."""

    def __init__(self, tensors):
        self._left = dict(tensors)
        self._missing, self._wrong = [], []

    def take(self, name, *shape, optional=False, hint=""):
        tensor = self._left.pop(name, None)
        if tensor is None:
            if not optional:
                self._missing.append(name)
            return None
        if tuple(tensor.shape) != shape:
            self._wrong.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}{hint}")
            return None
        return tensor

    def finish(self):
        """Raises with every name that is missing, unknown or of the wrong shape."""
        problems = list(self._wrong)
        if self._missing:
            problems.append("missing: " + ", ".join(self._missing))
        if self._left:
            problems.append("unknown: " + ", ".join(sorted(self._left)))
        if problems:
            raise ConvertError(EXIT_WEIGHTS, "weights: " + "; ".join(problems))


def exported(source):
    """What leaves with a run or a checkpoint folder: (its configuration, its tensors by name, its tokenizer's spec)."""
    import torch
    import yaml

    import libxlstm
    from libxlstm.scoring import find_tokenizer

    model = libxlstm.load(source)
    config = yaml.safe_load(model.settings)
    if config["model"]["lora"]["rank"]:
        model = model.merge_lora()
    if any(tensor.dtype == torch.int8 for tensor in model.parameters()):
        raise ConvertError(EXIT_WEIGHTS, f"{source}: weights of 8 bits; export the folder that they were rounded from")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return config, tensors, find_tokenizer(model.folder, config["data"]["tokenizer"])


@contextlib.contextmanager
def new_folder(folder):
    """A folder to write to, which must be empty or absent; it is taken away again where writing fails."""
    if os.path.isdir(folder) and os.listdir(folder):
        raise ConvertError(EXIT_WEIGHTS, f"{folder}: exists and is not empty; choose another name")
    os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
