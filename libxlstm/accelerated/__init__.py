"""accelerate(): the cells of packages that people have models of, computed by torch.ops.xlstm.

A module is changed by its class alone: in place of the package's it gets one of the same name here that derives from it and
computes otherwise. Parameters, buffers, attributes, hooks and names stay, and with them what reads them: state_dict(),
save_pretrained(), adapters, checkpointing, copy.deepcopy and pickle (where libxlstm can be imported).
"""

import functools
import importlib
import importlib.metadata
import warnings
from collections import defaultdict

# Where a class of a package is defined -> the module here with what stands in for it, its CELLS. Imported when a model has
# such a class, so that no package is needed otherwise.
_SOURCES = {
    "mlstm_kernels.": "large",
    "xlstm.xlstm_large.": "large",
    "transformers.models.xlstm.": "native",
    "xlstm.blocks.": "small",
    "xlstm.components.": "small",
}
# What a newer one computes is not known here.
_KNOWN_VERSIONS = {"mlstm_kernels": 2, "xlstm": 2, "transformers": 5}


def accelerate(model, enabled=True):
    """Makes a model of transformers' xLSTM or of the xlstm package compute by torch.ops.xlstm. Returns it, changed in place.

        model = libxlstm.accelerate(transformers.AutoModelForCausalLM.from_pretrained("NX-AI/xLSTM-7b"))

    Everything around stays as it was: weights, state_dict() and module names, configuration, save_pretrained(), states and
    caches with their shapes and dtypes, generate(), gradient checkpointing, adapters, hooks, autocast, devices. So do results,
    up to rounding; gradients are the true ones, also where a kernel of mlstm_kernels leaves out the normaliser's. Replaced are

    - in transformers.xLSTMForCausalLM and xLSTMModel, with and without the xlstm package, and in its xLSTMLarge: the mLSTM for
      training, prefilling and decoding (mLSTMBackend of mlstm_kernels, xLSTMBackend of transformers), for any length in any
      mode; the norm of its heads with the output gate; RMSNorm;
    - in xlstm.xLSTMLMModel and xLSTMBlockStack: mLSTMCell, as a sequence of any length and as a step, sLSTMCell of both
      backends, CausalConv1d, LinearHeadwiseExpand, MultiHeadLayerNorm, and in mLSTMLayer what lies between its projections.

    model: any torch.nn.Module; the cells are found wherever they are in it, under wrappers of peft and torch.nn.parallel, too.
    What is not covered (an option of theirs, a subclass, a forward() that hooks of a device_map have replaced) stays as it is,
    and one warning says what and why; another tells if there is no such cell at all. An inner module that is wrapped or hooked
    later is called as ever: the layer around it then computes in parts.

    enabled: False gives back the packages' own classes. Copies that were made of the model in between are models of their own.
    """
    return _exchange(model) if enabled else _give_back(model)


def _exchange(model):
    found, left = False, defaultdict(list)
    for name, module in model.named_modules():
        ours, reason = _stand_in(module)
        found = found or ours is not None or reason is not None
        if reason:
            left[type(module).__name__, reason].append(name or "the model itself")
        elif ours:
            module.__class__ = ours
    for (kind, reason), names in left.items():
        _warn(f"{kind}: {reason}; left as it is: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    if not found:
        _warn("found no cell of transformers' xLSTM or of the xlstm package: the model stays as it is")
    return model


def _give_back(model):
    for module in model.modules():
        if _is_ours(type(module)):
            module.__class__ = type(module).THEIRS
    return model


def _warn(text):
    warnings.warn(f"libxlstm.accelerate: {text}", stacklevel=4)


def _is_ours(kind):
    return kind.__module__.startswith(f"{__name__}.")


def _stand_in(module):
    """The class for a module and why it cannot have it: (class or None, reason or None), both None for what is no cell."""
    kind = type(module)
    if _is_ours(kind):
        return kind, None
    theirs = next((base for base in kind.__mro__ if base in _cells(base)), None)
    if theirs is None:
        return None, None
    if theirs is not kind:
        return None, f"a class of its own, which derives from {theirs.__module__}.{theirs.__name__}"
    if "forward" in vars(module):
        return None, "something has put another forward() in the place of its own"
    ours = _cells(theirs)[theirs]
    package = theirs.__module__.split(".")[0]
    return ours, ours.why_not(module) or _unknown_version(package)


def _cells(kind):
    source = next((source for prefix, source in _SOURCES.items() if kind.__module__.startswith(prefix)), None)
    return importlib.import_module(f"{__name__}.{source}").CELLS if source else {}


@functools.cache
def _unknown_version(package):
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from a source tree
        return None
    known = _KNOWN_VERSIONS[package]
    return None if int(version.split(".")[0]) <= known else f"{package} {version} is newer than the {known}.x known here"
