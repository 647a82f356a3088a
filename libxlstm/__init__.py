"""xLSTM operators and models on LibTorch.

Importing registers the operators as torch.ops.xlstm.*; load() gives a trained model:

    model = libxlstm.load("runs/demo", device="cuda")    # a checkpoint or run folder; a torch.nn.Module
    logits, state = model(ids)                           # ids (B,T) int64 -> logits (B,T,V)
    logits, state = model(next_ids, state)               # goes on from there, any number of tokens

and BlockStack() blocks for networks of your own:

    stack = libxlstm.BlockStack(embedding_dim=128, num_blocks=4, slstm_at=[1])
    y, state = stack(x)                                  # x (B,T,128) -> y (B,T,128)

TokenData() gives the sequences of prepared token files in the trainer's order, TokenWriter() makes such files of ids.
accelerate() makes models of transformers and of the xlstm package compute by the operators.
"""

import importlib
import os
from pathlib import Path

import torch

from . import flops
from .accelerated import accelerate
from .data import TokenData
from .library import as_yaml, load_module, load_operators
from .model import BlockStack, Model
from .states import detach, merge_states, split_state

__all__ = ["BlockStack", "Error", "Model", "TokenData", "TokenWriter", "accelerate", "detach", "load", "make_model", "merge_states",
           "split_state", "__version__"]
__version__ = "0.1.0"  # CMake and setuptools read it here


def load(checkpoint_dir, verify=True, device="cpu", dtype=None, settings=None):
    """The Model of a checkpoint folder, or of a run folder (its newest good checkpoint), in eval mode.

    verify: check every file against its sha256. device, dtype: of the parameters; None: float32. torch.bfloat16 takes half the
    memory, also while it loads, torch.int8 about a quarter: see Model.quantize(). settings: in place of the checkpoint's, such as
    {"model": {"dropout": 0.1, "activation_checkpointing": True}}; its tensors must fit still. {"model": {"lora": {"rank": 8}}}
    gives fresh low-rank adapters (torch.manual_seed decides), which stay float32, and they alone are trained; nothing else is
    drawn. With "base": "int8" or "bfloat16" in the inner dictionary the weights beside them, and these alone, are kept so, and it
    computes in float32 or as autocast says.

    Raises libxlstm.Error (a RuntimeError) naming the file and what is wrong with it.
    """
    module = load_module()
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, dtypes))}, got {dtype!r}")
    try:
        core = module.load(str(checkpoint_dir), verify, dtype or torch.float32, list(_overrides(settings or {})))
    except module.Error as error:
        if not (Path(checkpoint_dir) / "config.json").is_file():  # here it is config.yaml
            raise
        hint = module.Error(f"{error}; of a folder of transformers `python -m libxlstm.convert --from hf` makes one")
        hint.code = error.code
        raise hint from None
    return Model(core).to(device=device)


def _overrides(settings, section=""):
    """{"model": {"dropout": 0.1}} as the programs take it, model.dropout=0.1."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _overrides(value, f"{section}{name}.")
        else:
            yield f"{section}{name}={as_yaml(value)}"


def make_model(settings=None, **model):
    """A freshly initialised Model (torch.manual_seed decides), float32, on the CPU and in train mode; to() moves it.

    model: the settings of `model`, as BlockStack takes them: make_model(embedding_dim=256, num_blocks=8, slstm_at=[1]). Or
    settings: a whole configuration as the programs take it, of which model counts: a dictionary, a YAML text, or a
    pathlib.Path, whose file is read as xlstm-train reads it. `xlstm-train --help` lists all of it. Raises libxlstm.Error naming
    the setting that is wrong.
    """
    if (settings is None) == (not model):
        raise TypeError("make_model: expected either a configuration or settings of `model` by name")
    module = load_module()
    if isinstance(settings, os.PathLike):
        return Model(module.make_model(os.fspath(settings), True))
    text = settings if isinstance(settings, str) else as_yaml({"model": model} if settings is None else settings)
    if isinstance(settings, str) and text.strip() and ":" not in text and "{" not in text:  # no mapping
        error = module.Error(f"settings: expected YAML such as 'model: {{embedding_dim: 256}}', got {text!r}; of a file "
                             f"give its path: pathlib.Path({text!r})")
        error.code = 2
        raise error
    return Model(module.make_model(text, False))


def __getattr__(name):
    if name in ("Error", "_C"):
        module = load_module()
        return module if name == "_C" else module.Error
    if name == "scoring":
        return importlib.import_module(".scoring", __name__)
    if name == "TokenWriter":
        return importlib.import_module(".token_writer", __name__).TokenWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


load_operators()
flops.register_on_import()
