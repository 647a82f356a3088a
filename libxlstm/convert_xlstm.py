"""Weights of the `xlstm` package's small models (xLSTMLMModel), both ways, for convert.py.

The configuration is the package's own nested form (xLSTMLMModelConfig) as the root of a YAML file or under `model`; the
weights are its state_dict as safetensors. What differs there, and is put right here:
  norms                     used as 1 + w                             -> plain weights
  sLSTM `fgate` / `igate`   `fgate` feeds the i slot, `igate` the f   -> named by what they are
  _recurrent_kernel_        cuda (NH,in,4*out), vanilla (NH,4*out,in) -> recurrent (4,NH,out,in)
  _bias_                    cuda (NH,4,DH), vanilla (4,NH,DH), flat   -> bias (4,NH,DH)
"""

import math
import os
from typing import Callable, NamedTuple

from libxlstm.convert_common import EXIT_CONFIG, EXIT_WEIGHTS, ConvertError, Section, Weights, exported, new_folder

_IGNORED = {
    # Settings without a trace in the function the weights compute: the importer passes over them.
    "model": {"context_length", "weight_decay_on_embedding"},
    "mlstm": {"embedding_dim", "bias", "dropout", "context_length"},
    "slstm": {
        "embedding_dim", "hidden_size", "dropout", "backend", "num_states", "num_gates", "batch_size", "input_shape",
        "internal_input_shape", "output_shape", "constants", "dtype", "dtype_b", "dtype_r", "dtype_w", "dtype_g",
        "dtype_s", "dtype_a", "enable_automatic_mixed_precision", "initial_val",
    },
    "feedforward": {"embedding_dim", "dropout"},
}
_ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "relu": "relu", "relu^2": "relu2"}
LAYOUTS = ("cuda", "vanilla")


def _proj_up(section, embedding_dim, proj_factor):
    """(factor, multiple) of the package's UpProjConfigMixin, as they give its width when it is rounded up."""
    factor = section.number("proj_factor", proj_factor, float)
    multiple = section.number("round_proj_up_to_multiple_of", 64)
    exact = factor * embedding_dim / multiple
    up = section.flag("round_proj_up_dim_up", True)
    return (factor if up else math.floor(exact) * multiple / embedding_dim), multiple


def read_config(config, place="config"):
    """xLSTMLMModelConfig as nested dicts -> (settings of libxlstm's `model` section, layout of the sLSTM weights)."""
    root = Section(config, _IGNORED["model"], place)
    width = root.number("embedding_dim", 128)
    blocks = root.number("num_blocks", 1)
    mlstm_block, slstm_block = root.section("mlstm_block", _IGNORED["mlstm"]), root.section("slstm_block", _IGNORED["slstm"])
    slstm_at = root.take("slstm_at", [])
    if mlstm_block is None or slstm_at == "all":
        slstm_at = list(range(blocks))
    model = {
        "kind": "xlstm",
        "vocab_size": root.number("vocab_size", -1),
        "embedding_dim": width,
        "num_blocks": blocks,
        "tie_weights": root.flag("tie_weights", False),
        "dropout": root.number("dropout", 0.0, float),
        "add_embedding_dropout": root.flag("add_embedding_dropout", False),
        "add_out_norm": root.flag("add_post_blocks_norm", True),
        "bias": root.flag("bias", False),
        "slstm_at": sorted(set(slstm_at)),
    }
    root.finish()
    heads, layout = [], "cuda"
    if len(model["slstm_at"]) < blocks:
        heads.append(_read_mlstm(mlstm_block, model))
    if model["slstm_at"]:
        if slstm_block is None:
            raise ConvertError(EXIT_CONFIG, f"{place}.slstm_block: missing, but slstm_at has blocks of it")
        num_heads, layout = _read_slstm(slstm_block, model)
        heads.append(num_heads)
    if len(set(heads)) > 1:
        raise ConvertError(EXIT_CONFIG, f"{place}: mLSTM has {heads[0]} heads and sLSTM {heads[1]}: must be equal")
    model["num_heads"] = heads[0] if heads else 4
    return model, layout


def _read_mlstm(block, model):
    section = block.section("mlstm", _IGNORED["mlstm"]) or Section({}, _IGNORED["mlstm"], "mlstm")
    factor, multiple = _proj_up(section, model["embedding_dim"], 2.0)
    model["mlstm"] = {
        "proj_factor": factor,
        "round_proj_up_to_multiple_of": multiple,
        "conv1d_kernel_size": section.number("conv1d_kernel_size", 4),
        "qkv_proj_blocksize": section.number("qkv_proj_blocksize", 4),
    }
    heads = section.number("num_heads", 4)
    section.finish()
    block.finish()
    return heads


def _read_slstm(block, model):
    section = block.section("slstm", _IGNORED["slstm"]) or Section({}, _IGNORED["slstm"], "slstm")
    layout = section.take("backend", "cuda", choices=LAYOUTS)
    model["slstm"] = {
        "conv1d_kernel_size": section.number("conv1d_kernel_size", 4),
        "cell": section.take("function", "slstm", choices=("slstm", "lstm")),
        "bias_init": section.take("bias_init", "powerlaw_blockdependent"),
        "recurrent_weight_init": section.take("recurrent_weight_init", "zeros"),
        "recurrent_cut": section.take("gradient_recurrent_cut", False, choices=(False, True)),
    }
    section.take("group_norm_weight", True)  # without it there is no key in the weights: ones
    # The package's CUDA kernels clip y itself with the value meant for its gradient.
    for clip in ("gradient_recurrent_clipval", "forward_clipval"):
        section.take(clip, None, choices=(None,))
    heads = section.number("num_heads", 4)
    section.finish()

    feed_forward = block.section("feedforward", _IGNORED["feedforward"])
    if feed_forward is None:
        raise ConvertError(EXIT_CONFIG, "slstm_block.feedforward: missing; sLSTM blocks without MLP cannot be imported")
    feed_forward.take("ff_type", "ffn_gated", choices=("ffn_gated",))
    factor, multiple = _proj_up(feed_forward, model["embedding_dim"], 1.3)
    model["feed_forward"] = {
        "proj_factor": factor,
        "round_up_to_multiple_of": multiple,
        "act_fn": _ACTIVATIONS[feed_forward.take("act_fn", "gelu", choices=tuple(_ACTIVATIONS))],
    }
    # One switch here, two there: the projections without a bias get a zero one.
    model["bias"] = feed_forward.flag("bias", False) or model["bias"]
    feed_forward.finish()
    block.finish()
    return heads, layout


class _Row(NamedTuple):
    """A parameter: its name here and there, its shape there, and how each becomes the other."""

    ours: str
    theirs: str
    shape: tuple
    read: Callable = lambda tensor: tensor
    write: Callable = lambda tensor: tensor
    absent: Callable | None = None  # gives what stands for it where the weights lack it; None: they must not
    hint: str = ""


def _norm(ours, theirs, width, **more):
    return _Row(ours, theirs, (width,), lambda tensor: 1 + tensor, lambda tensor: tensor - 1, **more)


def _bias(ours, theirs, width):
    """A projection's bias; zeros where this one has none but another projection of the model has."""
    import torch

    return _Row(ours, theirs, (width,), absent=lambda: torch.zeros(width))


def _conv(ours, theirs, width, kernel_size):
    if kernel_size > 0:
        yield _Row(ours + "weight", theirs + "weight", (width, 1, kernel_size), lambda w: w.squeeze(1), lambda w: w.unsqueeze(1))
        yield _Row(ours + "bias", theirs + "bias", (width,))


def _round_up(options, width, multiple):
    """The width of an up-projection; `multiple` names the setting it is rounded up to."""
    return math.ceil(options["proj_factor"] * width / options[multiple]) * options[multiple]


def _mlstm_rows(model, to, source):
    options, width, heads = model["mlstm"], model["embedding_dim"], model["num_heads"]
    size, inner = options["qkv_proj_blocksize"], _round_up(options, width, "round_proj_up_to_multiple_of")
    yield _Row(to + "proj_up.weight", source + "proj_up.weight", (2 * inner, width))
    yield from _conv(to + "conv.", source + "conv1d.conv.", inner, options["conv1d_kernel_size"])
    for name in ("q_proj", "k_proj", "v_proj"):
        yield _Row(f"{to}{name}.weight", f"{source}{name}.weight", (inner // size, size, size))
    for name in ("igate", "fgate"):
        yield _Row(f"{to}{name}.weight", f"{source}mlstm_cell.{name}.weight", (heads, 3 * inner))
        yield _Row(f"{to}{name}.bias", f"{source}mlstm_cell.{name}.bias", (heads,))
    yield _norm(to + "out_norm.weight", source + "mlstm_cell.outnorm.weight", inner)
    yield _Row(to + "skip", source + "learnable_skip", (inner,))
    yield _Row(to + "proj_down.weight", source + "proj_down.weight", (width, inner))
    if model["bias"]:
        lengths = {"proj_up": 2 * inner, "q_proj": inner, "k_proj": inner, "v_proj": inner, "proj_down": width}
        for name, length in lengths.items():
            yield _bias(f"{to}{name}.bias", f"{source}{name}.bias", length)


def _slstm_rows(model, to, source, layout):
    import torch

    width, heads = model["embedding_dim"], model["num_heads"]
    size = width // heads
    yield from _conv(to + "conv.", source + "conv1d.conv.", width, model["slstm"]["conv1d_kernel_size"])
    for name, theirs in (("igate", "fgate"), ("fgate", "igate"), ("zgate", "zgate"), ("ogate", "ogate")):
        yield _Row(f"{to}{name}.weight", f"{source}{theirs}.weight", (heads, size, size))
    kernel, bias = source + "slstm_cell._recurrent_kernel_", source + "slstm_cell._bias_"
    hint = " (the layout of the other sLSTM backend? See --slstm-layout)"
    if layout == "cuda":
        yield _Row(to + "recurrent", kernel, (heads, size, 4 * size),
                   lambda r: r.view(heads, size, 4, size).permute(2, 0, 3, 1),
                   lambda r: r.permute(1, 3, 0, 2).reshape(heads, size, 4 * size), hint=hint)
        yield _Row(to + "bias", bias, (4 * width,), lambda b: b.view(heads, 4, size).transpose(0, 1),
                   lambda b: b.transpose(0, 1).reshape(-1))
    else:
        yield _Row(to + "recurrent", kernel, (heads, 4 * size, size),
                   lambda r: r.view(heads, 4, size, size).transpose(0, 1),
                   lambda r: r.transpose(0, 1).reshape(heads, 4 * size, size), hint=hint)
        yield _Row(to + "bias", bias, (4 * width,), lambda b: b.view(4, heads, size), lambda b: b.reshape(-1))
    yield _norm(to + "out_norm.weight", source + "group_norm.weight", width, absent=lambda: torch.ones(width))


def _feed_forward_rows(model, to, source):
    width = model["embedding_dim"]
    hidden = _round_up(model["feed_forward"], width, "round_up_to_multiple_of")
    for name, rows, columns in (("proj_up", 2 * hidden, width), ("proj_down", width, hidden)):
        yield _Row(f"{to}{name}.weight", f"{source}{name}.weight", (rows, columns))
        if model["bias"]:
            yield _bias(f"{to}{name}.bias", f"{source}{name}.bias", rows)


def _rows(model, layout):
    """Every parameter of a model but the head's."""
    width = model["embedding_dim"]
    yield _Row("embedding.weight", "token_embedding.weight", (model["vocab_size"], width))
    for index in range(model["num_blocks"]):
        to, source = f"blocks.{index}.", f"xlstm_block_stack.blocks.{index}."
        yield _norm(to + "norm.weight", source + "xlstm_norm.weight", width)
        if index in model["slstm_at"]:
            yield from _slstm_rows(model, to + "slstm.", source + "xlstm.", layout)
            yield _norm(to + "ffn_norm.weight", source + "ffn_norm.weight", width)
            yield from _feed_forward_rows(model, to + "ffn.", source + "ffn.")
        else:
            yield from _mlstm_rows(model, to + "mlstm.", source + "xlstm.")
    if model["add_out_norm"]:
        yield _norm("out_norm.weight", "xlstm_block_stack.post_blocks_norm.weight", width)


def convert_xlstm(config, tensors, slstm_layout=None):
    """Configuration (nested dicts) and state_dict of an xLSTMLMModel -> (libxlstm's model settings, its tensors)."""
    model, layout = read_config(config)
    source, out = Weights({name: tensor.float() for name, tensor in tensors.items()}), {}
    for row in _rows(model, slstm_layout or layout):
        tensor = source.take(row.theirs, *row.shape, optional=row.absent is not None, hint=row.hint)
        if tensor is not None:
            out[row.ours] = row.read(tensor).contiguous()
        elif row.absent is not None:
            out[row.ours] = row.absent()
    head = source.take("lm_head.weight", model["vocab_size"], model["embedding_dim"], optional=model["tie_weights"])
    source.finish()
    if not model["tie_weights"]:
        out["lm_head.weight"] = head
    elif head is not None and not head.equal(out["embedding.weight"]):
        raise ConvertError(EXIT_WEIGHTS, "weights: tie_weights is true but lm_head.weight is not the embedding")
    return model, out


def export_config(model, seq_len, layout):
    """libxlstm's `model` section -> xLSTMLMModelConfig as nested dicts."""
    slstm_at, blocks = model["slstm_at"], model["num_blocks"]
    mlstm, slstm, feed_forward = (model[name] for name in ("mlstm", "slstm", "feed_forward"))
    fixed = {"kind": "xlstm", "input_features": 0, "output_logit_soft_cap": 0, "norm_eps": 1e-5, "mlstm_eps": 1e-6}
    settings = [("", model, fixed)]
    if len(slstm_at) < blocks:
        fixed = {"up_projection": "pre", "input_gate": "exp", "normalize": True, "igate": "input", "fgate": "input"}
        settings.append(("mlstm.", mlstm, fixed))
    if slstm_at:
        settings += [("slstm.", slstm, {"gate_proj": "headwise"}), ("feed_forward.", feed_forward, {"gated": True})]
    for section, values, expected in settings:
        for key, value in expected.items():
            if values[key] != value:
                raise ConvertError(EXIT_CONFIG, f"model.{section}{key}: {values[key]!r}; the xlstm package has {value!r} alone")
    config = {
        "vocab_size": model["vocab_size"],
        "embedding_dim": model["embedding_dim"],
        "num_blocks": blocks,
        "context_length": seq_len,
        "tie_weights": model["tie_weights"],
        "dropout": model["dropout"],
        "add_embedding_dropout": model["add_embedding_dropout"],
        "add_post_blocks_norm": model["add_out_norm"],
        "bias": model["bias"],
        "slstm_at": slstm_at,
    }
    if len(slstm_at) < blocks:
        if mlstm["conv1d_kernel_size"] == 0:
            raise ConvertError(EXIT_CONFIG, "model.mlstm.conv1d_kernel_size: 0; the xlstm package's mLSTM has a convolution")
        same = ("proj_factor", "round_proj_up_to_multiple_of", "conv1d_kernel_size", "qkv_proj_blocksize")
        config["mlstm_block"] = {"mlstm": {"num_heads": model["num_heads"], **{key: mlstm[key] for key in same}}}
    if slstm_at:
        if slstm["cell"] not in ("slstm", "lstm"):
            raise ConvertError(EXIT_CONFIG, f"model.slstm.cell: {slstm['cell']}; the xlstm package has slstm and lstm")
        config["slstm_block"] = {
            "slstm": {
                "num_heads": model["num_heads"],
                "backend": layout,
                "dtype": "float32",
                "function": slstm["cell"],
                "gradient_recurrent_cut": slstm["recurrent_cut"],
                **{key: slstm[key] for key in ("conv1d_kernel_size", "bias_init", "recurrent_weight_init")},
            },
            "feedforward": {
                "proj_factor": feed_forward["proj_factor"],
                "round_proj_up_to_multiple_of": feed_forward["round_up_to_multiple_of"],
                "act_fn": {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[feed_forward["act_fn"]],
                "bias": model["bias"],
            },
        }
    return config


def export(source, folder, layout="vanilla"):
    """A run or a checkpoint folder -> a folder with config.yaml, model.safetensors and the tokenizer, for xLSTMLMModel: the
    sLSTM's weights as its backend `layout` has them. Returns its tensors by name."""
    import yaml

    import libxlstm
    from libxlstm.scoring import Tokenizer

    config, tensors, tokenizer = exported(source)
    theirs = export_config(config["model"], config["data"]["seq_len"], layout)
    renamed = {row.theirs: row.write(tensors[row.ours]).contiguous() for row in _rows(config["model"], layout)}
    renamed["lm_head.weight"] = tensors.get("lm_head.weight", tensors["embedding.weight"])
    with new_folder(folder):
        if tokenizer != "bytes":
            Tokenizer(tokenizer).save(os.path.join(folder, "tokenizer.json"))
        libxlstm._C.save_safetensors(os.path.join(folder, "model.safetensors"), renamed)
        with open(os.path.join(folder, "config.yaml"), "w", encoding="utf-8") as file:
            yaml.safe_dump(theirs, file, sort_keys=False)
    return renamed
