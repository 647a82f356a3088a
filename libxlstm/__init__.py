"""xLSTM operators and models on LibTorch.

Importing registers the operators as torch.ops.xlstm.*; load() gives a trained model:

    model = libxlstm.load("runs/demo", device="cuda")    # a checkpoint or run folder; a torch.nn.Module
    logits, state = model(ids)                           # ids (B,T) int64 -> logits (B,T,V)
    logits, state = model(next_ids, state)               # goes on from there, any number of tokens
"""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

import torch

from .model import Model

__all__ = ["Error", "Model", "load", "make_model", "__version__"]
__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
# Installed: the operators in lib/, the module beside this file. In the source tree: where CMake puts what it builds,
# all of it or (preset ops) the operators alone.
_FOLDERS = (_PACKAGE / "lib", _PACKAGE, _PACKAGE.parent / "build" / "lib", _PACKAGE.parent / "build-ops" / "lib")


def _find(*names):
    """The first file of one of these names, in the order of _FOLDERS."""
    for folder in _FOLDERS:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    looked = ", ".join(str(folder) for folder in _FOLDERS)
    raise ImportError(
        f"libxlstm: {names[0]} is in none of {looked}; build it with: pip install --no-build-isolation . "
        "(in the source tree also: ./scripts/test.sh)"
    )


def _minor(version):
    return ".".join(version.split("+")[0].split(".")[:2])


def _check_torch(library):
    """Refuses another torch: the C++ interface changes with every minor version, and a wrong one fails obscurely."""
    info = library.parent / "libxlstm_torch_version"
    built_with = info.read_text().strip() if info.is_file() else None
    if built_with is not None and _minor(built_with) != _minor(torch.__version__):
        raise ImportError(
            f"libxlstm was built with torch {built_with}, but torch {torch.__version__} is installed; build it "
            "again (pip install --no-build-isolation --force-reinstall --no-deps .) or install "
            f"torch=={_minor(built_with)}.*"
        )


def _load_operators():
    library = _find("libxlstm_ops.so")
    _check_torch(library)
    torch.ops.load_library(str(library))


def _load_module():
    """The C++ models, loaded at first use: programs that want the operators alone do not pay for them."""
    name = f"{__name__}._C"
    if name in sys.modules:
        return sys.modules[name]
    path = _find(*(f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def load(checkpoint_dir, verify=True, device="cpu", dtype=None):
    """The Model of a checkpoint folder, or of a run folder (its newest good checkpoint), in eval mode.

    verify: check every file against its sha256. device, dtype: of the parameters; None: float32. torch.bfloat16 takes half the
    memory, also while it loads.

    Raises libxlstm.Error (a RuntimeError) naming the file and what is wrong with it.
    """
    module = _load_module()
    try:
        core = module.load(str(checkpoint_dir), verify, dtype or torch.float32)
    except module.Error as error:
        if not (Path(checkpoint_dir) / "config.json").is_file():  # here it is config.yaml
            raise
        hint = module.Error(f"{error}; of a folder of transformers `python -m libxlstm.convert --from hf` makes one")
        hint.code = error.code
        raise hint from None
    return Model(core).to(device=device)


def make_model(settings):
    """A freshly initialised Model (torch.manual_seed decides), on the CPU and in train mode.

    settings: a configuration as the programs take it, as YAML or a dictionary, of which model counts:
    {"model": {"embedding_dim": 256, "num_blocks": 8, "slstm_at": [1]}}; `xlstm-train --help` lists all of it. Raises
    libxlstm.Error naming the setting that is wrong.
    """
    text = settings if isinstance(settings, str) else json.dumps(settings)  # which is YAML, too
    return Model(_load_module().make_model(text))


def __getattr__(name):
    if name in ("Error", "_C"):
        module = _load_module()
        return module if name == "_C" else module.Error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_load_operators()
