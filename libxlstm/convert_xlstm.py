"""Weights of the `xlstm` package's small models (xLSTMLMModel), for convert.py.

The configuration is the package's own nested form (xLSTMLMModelConfig) as the root of a YAML file or under `model`; the
weights are its state_dict as safetensors. What differs there, and is put right here:
  norms                     used as 1 + w                             -> plain weights
  sLSTM `fgate` / `igate`   `fgate` feeds the i slot, `igate` the f   -> named by what they are
  _recurrent_kernel_        cuda (NH,in,4*out), vanilla (NH,4*out,in) -> recurrent (4,NH,out,in)
  _bias_                    cuda (NH,4,DH), vanilla (4,NH,DH), flat   -> bias (4,NH,DH)
"""

import math

from libxlstm.convert_common import EXIT_CONFIG, EXIT_WEIGHTS, ConvertError, Section, Weights

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
}  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "relu": "relu"}


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
    layout = section.take("backend", "cuda", choices=("cuda", "vanilla"))
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


class _Importer:
    """Builds libxlstm's tensors, by name, from a state_dict of the package."""

    def __init__(self, tensors, model, layout):
        self._source = Weights({name: tensor.float() for name, tensor in tensors.items()})
        self._model, self._layout = model, layout
        self._out = {}

    def run(self):
        model, width = self._model, self._model["embedding_dim"]
        self._copy("embedding.weight", "token_embedding.weight", model["vocab_size"], width)
        for index in range(model["num_blocks"]):
            to, source = f"blocks.{index}.", f"xlstm_block_stack.blocks.{index}."
            self._norm(to + "norm.weight", source + "xlstm_norm.weight", width)
            if index in model["slstm_at"]:
                self._slstm(to + "slstm.", source + "xlstm.")
                self._norm(to + "ffn_norm.weight", source + "ffn_norm.weight", width)
                self._feed_forward(to + "ffn.", source + "ffn.")
            else:
                self._mlstm(to + "mlstm.", source + "xlstm.")
        if model["add_out_norm"]:
            self._norm("out_norm.weight", "xlstm_block_stack.post_blocks_norm.weight", width)
        head = self._source.take("lm_head.weight", model["vocab_size"], width, optional=model["tie_weights"])
        self._source.finish()
        if not model["tie_weights"]:
            self._out["lm_head.weight"] = head
        elif head is not None and not head.equal(self._out["embedding.weight"]):
            raise ConvertError(EXIT_WEIGHTS, "weights: tie_weights is true but lm_head.weight is not the embedding")
        return self._out

    def _copy(self, to, source, *shape):
        self._out[to] = self._source.take(source, *shape)

    def _norm(self, to, source, width, optional=False):
        weight = self._source.take(source, width, optional=optional)
        if weight is not None:
            self._out[to] = 1 + weight

    def _bias(self, to, source, width):
        """A projection's bias; zeros where this one has none but another projection of the model has."""
        import torch

        bias = self._source.take(source, width, optional=True)
        if self._model["bias"]:
            self._out[to] = torch.zeros(width) if bias is None else bias
        elif bias is not None:
            raise ConvertError(EXIT_WEIGHTS, f"weights: {source} is there, but bias is false in the configuration")

    def _conv(self, to, source, width, kernel_size):
        if kernel_size == 0:
            return
        weight = self._source.take(source + "weight", width, 1, kernel_size)
        if weight is not None:
            self._out[to + "weight"] = weight.squeeze(1)
        self._copy(to + "bias", source + "bias", width)

    def _mlstm(self, to, source):
        model, options = self._model, self._model["mlstm"]
        width, heads, size = model["embedding_dim"], model["num_heads"], options["qkv_proj_blocksize"]
        multiple = options["round_proj_up_to_multiple_of"]
        inner = math.ceil(options["proj_factor"] * width / multiple) * multiple
        self._copy(to + "proj_up.weight", source + "proj_up.weight", 2 * inner, width)
        self._bias(to + "proj_up.bias", source + "proj_up.bias", 2 * inner)
        self._conv(to + "conv.", source + "conv1d.conv.", inner, options["conv1d_kernel_size"])
        for name in ("q_proj", "k_proj", "v_proj"):
            self._copy(f"{to}{name}.weight", f"{source}{name}.weight", inner // size, size, size)
            self._bias(f"{to}{name}.bias", f"{source}{name}.bias", inner)
        for name in ("igate", "fgate"):
            self._copy(f"{to}{name}.weight", f"{source}mlstm_cell.{name}.weight", heads, 3 * inner)
            self._copy(f"{to}{name}.bias", f"{source}mlstm_cell.{name}.bias", heads)
        self._norm(to + "out_norm.weight", source + "mlstm_cell.outnorm.weight", inner)
        self._copy(to + "skip", source + "learnable_skip", inner)
        self._copy(to + "proj_down.weight", source + "proj_down.weight", width, inner)
        self._bias(to + "proj_down.bias", source + "proj_down.bias", width)

    def _slstm(self, to, source):
        import torch

        width, heads = self._model["embedding_dim"], self._model["num_heads"]
        size = width // heads
        self._conv(to + "conv.", source + "conv1d.conv.", width, self._model["slstm"]["conv1d_kernel_size"])
        for name, theirs in (("igate", "fgate"), ("fgate", "igate"), ("zgate", "zgate"), ("ogate", "ogate")):
            self._copy(f"{to}{name}.weight", f"{source}{theirs}.weight", heads, size, size)
        cuda = self._layout == "cuda"
        shape = (heads, size, 4 * size) if cuda else (heads, 4 * size, size)
        hint = " (the layout of the other sLSTM backend? See --slstm-layout)"
        kernel = self._source.take(source + "slstm_cell._recurrent_kernel_", *shape, hint=hint)
        if kernel is not None and cuda:
            self._out[to + "recurrent"] = kernel.view(heads, size, 4, size).permute(2, 0, 3, 1).contiguous()
        elif kernel is not None:
            self._out[to + "recurrent"] = kernel.view(heads, 4, size, size).transpose(0, 1).contiguous()
        bias = self._source.take(source + "slstm_cell._bias_", 4 * width)
        if bias is not None:
            bias = bias.view(heads, 4, size).transpose(0, 1) if cuda else bias.view(4, heads, size)
            self._out[to + "bias"] = bias.contiguous()
        self._out[to + "out_norm.weight"] = torch.ones(width)
        self._norm(to + "out_norm.weight", source + "group_norm.weight", width, optional=True)

    def _feed_forward(self, to, source):
        width, options = self._model["embedding_dim"], self._model["feed_forward"]
        multiple = options["round_up_to_multiple_of"]
        hidden = math.ceil(options["proj_factor"] * width / multiple) * multiple
        self._copy(to + "proj_up.weight", source + "proj_up.weight", 2 * hidden, width)
        self._bias(to + "proj_up.bias", source + "proj_up.bias", 2 * hidden)
        self._copy(to + "proj_down.weight", source + "proj_down.weight", width, hidden)
        self._bias(to + "proj_down.bias", source + "proj_down.bias", width)


def convert_xlstm(config, tensors, slstm_layout=None):
    """Configuration (nested dicts) and state_dict of an xLSTMLMModel -> (libxlstm's model settings, its tensors)."""
    model, layout = read_config(config)
    return model, _Importer(tensors, model, slstm_layout or layout).run()
