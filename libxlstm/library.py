"""Where the package's shared libraries are, and how they are loaded."""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

import torch

from .operators import describe

_PACKAGE = Path(__file__).resolve().parent
# Installed: the operators in lib/, the module beside this file. In the source tree: where CMake puts what it builds,
# all of it or (preset ops) the operators alone.
_FOLDERS = (_PACKAGE / "lib", _PACKAGE, _PACKAGE.parent / "build" / "lib", _PACKAGE.parent / "build-ops" / "lib")


def find(*names):
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


def build_info(library):
    """What the build wrote beside a library: version, torch, compiler, cuda (None without kernels for it)."""
    info = library.parent / "libxlstm_build.json"
    return json.loads(info.read_text()) if info.is_file() else {}


def _check_torch(library):
    """Refuses another torch: the C++ interface changes with every minor version, and a wrong one fails obscurely."""
    built_with = build_info(library).get("torch")
    if built_with is not None and _minor(built_with) != _minor(torch.__version__):
        raise ImportError(
            f"libxlstm was built with torch {built_with}, but torch {torch.__version__} is installed; build it "
            "again (pip install --no-build-isolation --force-reinstall --no-deps .) or install "
            f"torch=={_minor(built_with)}.*"
        )


def as_yaml(settings):
    """As the C++ side reads them. JSON is YAML, too, but for characters beyond U+FFFF, which it escapes in two halves."""

    def plain(value):
        if hasattr(value, "tolist"):  # of numpy and torch
            return value.tolist()
        if isinstance(value, (range, set, frozenset)):
            return sorted(value)
        raise TypeError(f"settings: expected numbers, texts, lists and dictionaries, got {value!r}")

    return json.dumps(settings, ensure_ascii=False, default=plain)


def load_operators():
    library = find("libxlstm_ops.so")
    _check_torch(library)
    torch.ops.load_library(str(library))
    texts = library.parent / "libxlstm_operators.json"
    if texts.is_file():
        describe(texts)


def load_module():
    """The C++ models, loaded at first use: programs that want the operators alone do not pay for them."""
    name = f"{__package__}._C"
    if name in sys.modules:
        return sys.modules[name]
    path = find(*(f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
