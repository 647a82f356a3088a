"""xLSTM checkpoints of Hugging Face transformers (model_type xlstm: NX-AI/xLSTM-7b), both ways, for convert.py.

The block has the same parameter names here; model.kind is xlstm_large. What differs:
  backbone.embeddings.weight, backbone.blocks.*, backbone.out_norm.weight  -> embedding.weight, blocks.*, out_norm.weight
  weight_mode fused: qkv_opreact, ifgate_preact, proj_up_gate_z            -> their rows, apart
  qk_dim_factor, v_dim_factor: transformers rounds the widths up to 64, the xlstm package does not -> as the weights are
Tensors stay views of the files: an import never holds a model in memory, whatever its size, and keeps half precision.
An export writes the parameters of the loaded model in float32, which transformers loads in any precision.
"""

import json
import math
import os

from libxlstm.convert_common import EXIT_CONFIG, EXIT_WEIGHTS, ConvertError, Section, Weights, exported, new_folder
from libxlstm.tokenizer_worker import IMPORTED

# The 7B model was trained on sequences of this length (arXiv 2503.13427); its configuration does not say it.
SEQ_LEN = 8192
# Its texts follow the token that ends a document, which it reads as any other: contexts must not lose it.
DOCUMENTS = {"reset_state_at_document": False, "mask_loss_across_documents": False}
_INDEX = "model.safetensors.index.json"
_WIDTHS = ("qk_dim_factor", "v_dim_factor")
_NO_CAP = 1e30  # in float32, c * tanh(x / c) is x; transformers caps always

# Of the model: which kernel computes it, and in which precision. Of the 7B model's own config.json: what its first code knew
# and transformers does not. Of every model of transformers: what surrounds it.
_IGNORED = {
    "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states", "autocast_kernel_dtype",
    "inference_state_dtype", "max_inference_chunksize", "norm_reduction_force_float32", "use_cache",
    "add_embedding_dropout", "add_forward_backend_padding", "cell_norm_eps", "force_bos_token_insert", "head_dim",
    "igate_bias_init_range", "mlstm_round_up_to_multiple_of",
    "architectures", "torch_dtype", "dtype", "transformers_version", "auto_map", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "prefix",
    "return_dict", "output_hidden_states", "output_attentions", "use_return_dict", "torchscript", "chunk_size_feed_forward",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "pruned_heads",
    "use_bfloat16", "tf_legacy_loss", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}
# That first code could compute other blocks with these.
_FIRST_CODE = {"add_post_blocks_norm": True, "add_post_norm": False, "add_qk_norm": False}
# What an import keeps of config.json for the way back: all but what an export says itself.
_KEPT = (_IGNORED | {"chunkwise_kernel"}) - {"architectures", "torch_dtype", "dtype", "transformers_version", "auto_map"}
_SPECIAL_IDS = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}


def _round_up(width, multiple):
    return int((width + multiple - 1) // multiple) * multiple


def _cap(section, key, default):
    """A soft cap; null is none, 0 here."""
    value = section.take(key, default)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConvertError(EXIT_CONFIG, f"config.{key}: expected a positive number or null, got {value!r}")
    return float(value)


def read_config(config):
    """config.json -> libxlstm's `model` section, with the widths as transformers' factors have them, and whether weights are
    fused."""
    if isinstance(config, dict):  # null is what transformers fills in, but for the caps
        config = {key: value for key, value in config.items() if value is not None or key.endswith("soft_cap")}
    section = Section(config, _IGNORED, "config")
    section.take("model_type", None, choices=("xlstm",))
    # Two names each; transformers fills in the one that is absent.
    width, blocks = section.take("hidden_size"), section.take("num_hidden_layers")
    width = section.number("embedding_dim", 4096 if width is None else width)
    blocks = section.number("num_blocks", 32 if blocks is None else blocks)
    for name, value, other in (("hidden_size", width, "embedding_dim"), ("num_hidden_layers", blocks, "num_blocks")):
        if config.get(name, value) != value:
            raise ConvertError(EXIT_CONFIG, f"config.{name}: {config[name]!r} is not {other} {value}")
    kernel = section.take("chunkwise_kernel", "")
    if "siging" in str(kernel):
        raise ConvertError(EXIT_CONFIG, f"config.chunkwise_kernel: {kernel!r} cannot be imported: its input gate is a sigmoid")
    section.take("use_bias", False, choices=(False,))
    section.take("add_out_norm", True, choices=(True,))
    for key, value in _FIRST_CODE.items():
        section.take(key, value, choices=(value,))
    fused = section.take("weight_mode", "single", choices=("single", "fused")) == "fused"
    model = {
        "kind": "xlstm_large",
        "vocab_size": section.number("vocab_size", 50304),
        "embedding_dim": width,
        "num_blocks": blocks,
        "num_heads": section.number("num_heads", 8),
        "tie_weights": section.flag("tie_word_embeddings", False),
        "norm_eps": section.number("norm_eps", 1e-6, float),
        "mlstm_eps": section.number("eps", 1e-6, float),
        "qk_dim_factor": section.number("qk_dim_factor", 0.5, float),
        "v_dim_factor": section.number("v_dim_factor", 1.0, float),
        "gate_soft_cap": _cap(section, "gate_soft_cap", 15.0),
        "output_logit_soft_cap": _cap(section, "output_logit_soft_cap", 30.0),
        "feed_forward": {
            "proj_factor": section.number("ffn_proj_factor", 2.667, float),
            "round_up_to_multiple_of": section.number("ffn_round_up_to_multiple_of", 64),
        },
    }
    section.finish("; where they change nothing that the weights compute, take them out of config.json")
    return model, fused


def exact_factor(width, dim):
    """A factor that gives `width` when multiplied by `dim`, without rounding."""
    factor = width / dim
    for candidate in (factor, math.nextafter(factor, math.inf), math.nextafter(factor, 0)):
        if candidate * dim == width:
            return candidate
    raise ConvertError(EXIT_WEIGHTS, f"weights: a width of {width} is no factor of the model's {dim}")


def unfused(tensors):
    """weight_mode fused holds several matrices one below the other: the same tensors, apart, as views."""
    parts = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        layer, _, leaf = module.rpartition(".")
        if leaf == "qkv_opreact":
            out_proj = tensors.get(f"{layer}.out_proj.weight")
            v_dim = tensor.shape[0] // 3 if out_proj is None else out_proj.shape[1]
            qk_dim = max(0, tensor.shape[0] // 2 - v_dim)
            sizes = {"q": qk_dim, "k": qk_dim, "v": v_dim, "ogate_preact": v_dim}
        elif leaf in ("ifgate_preact", "proj_up_gate_z"):
            half = tensor.shape[0] // 2
            names = ("igate_preact", "fgate_preact") if leaf == "ifgate_preact" else ("proj_up_gate", "proj_up")
            sizes = dict.fromkeys(names, half)
        else:
            parts[name] = tensor
            continue
        if sum(sizes.values()) != tensor.shape[0]:
            raise ConvertError(EXIT_WEIGHTS, f"weights: {name} has {tensor.shape[0]} rows, expected {sum(sizes.values())}")
        for part, rows in zip(sizes, tensor.split(list(sizes.values()))):
            parts[f"{layer}.{part}.{kind}"] = rows
    return parts


def _layout(model, qk_dim, v_dim):
    """(name here, name there, shape) of every parameter but the head's."""
    dim, heads = model["embedding_dim"], model["num_heads"]
    options = model["feed_forward"]
    ffn_dim = _round_up(options["proj_factor"] * dim, options["round_up_to_multiple_of"])
    block = {
        "norm_mlstm.weight": (dim,),
        "mlstm_layer.q.weight": (qk_dim, dim),
        "mlstm_layer.k.weight": (qk_dim, dim),
        "mlstm_layer.v.weight": (v_dim, dim),
        "mlstm_layer.ogate_preact.weight": (v_dim, dim),
        "mlstm_layer.igate_preact.weight": (heads, dim),
        "mlstm_layer.igate_preact.bias": (heads,),
        "mlstm_layer.fgate_preact.weight": (heads, dim),
        "mlstm_layer.fgate_preact.bias": (heads,),
        "mlstm_layer.multihead_norm.weight": (v_dim,),
        "mlstm_layer.out_proj.weight": (dim, v_dim),
        "norm_ffn.weight": (dim,),
        "ffn.proj_up_gate.weight": (ffn_dim, dim),
        "ffn.proj_up.weight": (ffn_dim, dim),
        "ffn.proj_down.weight": (dim, ffn_dim),
    }
    yield "embedding.weight", "backbone.embeddings.weight", (model["vocab_size"], dim)
    for index in range(model["num_blocks"]):
        for name, shape in block.items():
            yield f"blocks.{index}.{name}", f"backbone.blocks.{index}.{name}", shape
    yield "out_norm.weight", "backbone.out_norm.weight", (dim,)


def rounded_widths(model):
    """(setting, width, the next multiple of 64) of each width that is none: transformers computes with the latter."""
    widths = [(key, int(model["embedding_dim"] * model[key])) for key in _WIDTHS]
    return [(key, width, _round_up(width, 64)) for key, width in widths if width % 64]


def _width(tensors, name, axis, dim, factor, key):
    """A width as the weights have it, where it is one that the factor stands for."""
    widths = sorted({int(dim * factor), _round_up(dim * factor, 64)})
    found = tensors[name].shape[axis] if name in tensors else widths[0]  # missing: told with all that is missing
    if found not in widths:
        expected = " or ".join(map(str, widths))
        raise ConvertError(EXIT_WEIGHTS, f"weights: {name} has a width of {found}, config.{key} stands for {expected}")
    return found


def convert_hf(config, tensors):
    """config.json and the tensors of the checkpoint, by name -> (libxlstm's model settings, its tensors)."""
    model, fused = read_config(config)
    tensors = unfused(tensors) if fused else dict(tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() not in (2, 4):
            raise ConvertError(EXIT_WEIGHTS, f"weights: {name} is {tensor.dtype}, expected float32, bfloat16 or float16")
        if name.endswith("multihead_norm.weight"):  # some hold it per head
            tensors[name] = tensor.reshape(-1)
    dim, layer = model["embedding_dim"], "backbone.blocks.0.mlstm_layer."
    qk_dim = _width(tensors, layer + "q.weight", 0, dim, model["qk_dim_factor"], "qk_dim_factor")
    v_dim = _width(tensors, layer + "out_proj.weight", 1, dim, model["v_dim_factor"], "v_dim_factor")
    model["qk_dim_factor"], model["v_dim_factor"] = exact_factor(qk_dim, dim), exact_factor(v_dim, dim)
    source = Weights(tensors)
    out = {ours: source.take(theirs, *shape) for ours, theirs, shape in _layout(model, qk_dim, v_dim)}
    # transformers computes with the head's own weight wherever there is one, whatever tie_word_embeddings says.
    head = source.take("lm_head.weight", model["vocab_size"], dim, optional=model["tie_weights"])
    source.finish()
    model["tie_weights"] = head is None
    if head is not None:
        out["lm_head.weight"] = head
    return model, out


def _read_json(path, code):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ConvertError(code, f"{path}: {' '.join(str(error).split())}") from error


def _open_tensors(path):
    """Tensors of a safetensors file by name: views of the file, read when they are used."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises types of its own for a broken file
        raise ConvertError(EXIT_WEIGHTS, f"{path}: {' '.join(str(error).split())}") from error


def read_folder(folder):
    """(config.json, tensors by name) of a folder that save_pretrained wrote, in one file or several."""
    if not os.path.isdir(folder):
        how = "one of the Hub comes by: hf download NAME --local-dir FOLDER"
        raise ConvertError(EXIT_CONFIG, f"{folder}: no such folder; {how}")
    if any(os.path.exists(os.path.join(folder, name)) for name in ("config.yaml", "ckpt")):
        how = "of one --to hf makes a folder of transformers"
        raise ConvertError(EXIT_CONFIG, f"{folder}: a run or a checkpoint of libxlstm; {how}")
    config = _read_json(os.path.join(folder, "config.json"), EXIT_CONFIG)
    index = os.path.join(folder, _INDEX)
    if not os.path.isfile(index):
        return config, _open_tensors(os.path.join(folder, "model.safetensors"))
    places = _read_json(index, EXIT_WEIGHTS).get("weight_map", {})
    tensors = {}
    for name in sorted(set(places.values())):
        tensors.update(_open_tensors(os.path.join(folder, os.path.basename(name))))
    absent = sorted(set(places) - set(tensors))
    if absent:
        raise ConvertError(EXIT_WEIGHTS, f"{index}: not in its files: {', '.join(absent)}")
    return config, tensors


def imported(config, tokenizer_files):
    """The content of imported.json, which goes with the tokenizer from the imported folder into every checkpoint that is
    trained from it: what config.json says besides the model, for the way back, and the token before prompts, if there is one.

    The 7B model's tokenizer puts none there, but the model has read one before every text: its config.json asks for it.
    """
    kept = {key: value for key, value in config.items() if key in _KEPT}
    bos, about = config.get("bos_token_id", 0), _json_of(tokenizer_files, "tokenizer_config.json")
    wanted = config.get("force_bos_token_insert") or about.get("add_bos_token") or _adds(tokenizer_files, bos)
    return {"config": kept} | ({"bos_id": bos} if wanted and isinstance(bos, int) else {})


def _adds(tokenizer_files, bos):
    """Whether the tokenizer itself puts this token before a text."""
    from tokenizers import Tokenizer

    if "tokenizer.json" not in tokenizer_files:
        return False
    return Tokenizer.from_buffer(tokenizer_files["tokenizer.json"]).encode("").ids[:1] == [bos]


def _json_of(files, name):
    """The mapping that a file holds; an empty one where it is absent."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ConvertError(EXIT_CONFIG, f"{name}: {error}") from error
    if not isinstance(value, dict):
        raise ConvertError(EXIT_CONFIG, f"{name}: expected a mapping")
    return value


def export_config(model):
    """config.json of transformers for libxlstm's `model` section."""
    if model["kind"] != "xlstm_large":
        raise ConvertError(EXIT_CONFIG, f"model.kind {model['kind']}: transformers knows the architecture xlstm_large alone")
    if not model["add_out_norm"] or model["gate_soft_cap"] == 0 or model["input_features"]:
        raise ConvertError(EXIT_CONFIG, "transformers' xLSTM reads tokens, caps its gates and has a norm before its head: "
                                        "expected model.input_features 0, gate_soft_cap above 0 and add_out_norm true")
    dim = model["embedding_dim"]
    for key, width, wider in rounded_widths(model):
        how = f"with model.{key}={wider / dim:g}, or with a model.embedding_dim of which {model[key]:g} is a multiple of 64"
        raise ConvertError(EXIT_CONFIG, f"model.{key}: a width of {width}; transformers rounds it up to {wider} and has no "
                                        f"place for these weights. Train what is to go there {how}")
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "dtype": "float32",
        "vocab_size": model["vocab_size"],
        "hidden_size": dim,
        "embedding_dim": dim,
        "num_hidden_layers": model["num_blocks"],
        "num_blocks": model["num_blocks"],
        "num_heads": model["num_heads"],
        "use_bias": False,
        "tie_word_embeddings": False,  # transformers does not tie this model's weights: the head is written
        "add_out_norm": True,
        "norm_eps": model["norm_eps"],
        "norm_reduction_force_float32": True,
        **{key: exact_factor(int(dim * model[key]), dim) for key in _WIDTHS},
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "mode": "inference",
        "return_last_states": True,
        "autocast_kernel_dtype": "float32",  # as here: the mLSTM computes in the dtype of its inputs
        "inference_state_dtype": "float32",
        "eps": model["mlstm_eps"],
        "ffn_proj_factor": model["feed_forward"]["proj_factor"],
        "ffn_round_up_to_multiple_of": model["feed_forward"]["round_up_to_multiple_of"],
        "gate_soft_cap": model["gate_soft_cap"],
        "output_logit_soft_cap": model["output_logit_soft_cap"] or _NO_CAP,
        "weight_mode": "single",
    }


def _write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def _write_weights(folder, tensors, shard_bytes, save):
    shards, sizes = [{}], [0]
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({}), sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += size
    if len(shards) == 1:
        save(os.path.join(folder, "model.safetensors"), shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save(os.path.join(folder, file), shard)
        places.update(dict.fromkeys(shard, file))
    _write_json(folder, _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})


def _write_tokenizer(folder, spec):
    """The tokenizer as transformers' AutoTokenizer reads it, with the files that it came with. Returns what config.json says
    besides the model: all that an import has kept, or else the ids of the special tokens."""
    from libxlstm.scoring import Tokenizer

    if spec == "bytes":
        return dict.fromkeys(_SPECIAL_IDS)
    tokenizer = Tokenizer(spec)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    files = dict(tokenizer.companions)
    source = _json_of({IMPORTED: files.pop(IMPORTED, b"{}")}, IMPORTED)
    if "tokenizer_config.json" not in files:
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if tokenizer.eos_id >= 0:
            about |= dict.fromkeys(_SPECIAL_IDS.values(), tokenizer.token(tokenizer.eos_id))
        files["tokenizer_config.json"] = json.dumps(about, indent=2).encode() + b"\n"
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    if "config" in source:
        return source["config"]
    tokens = _json_of(files, "special_tokens_map.json") | _json_of(files, "tokenizer_config.json")
    return {key: tokenizer.token_id(_content(tokens.get(token))) for key, token in _SPECIAL_IDS.items()}


def _content(token):
    """The text of a special token, which is written alone or with its options."""
    return token.get("content") if isinstance(token, dict) else token


def export(source, folder, shard_bytes=5 * 10**9):
    """A run or a checkpoint folder -> a folder for transformers' from_pretrained. Returns its tensors by name."""
    import libxlstm

    config, tensors, tokenizer = exported(source)
    config_json = export_config(config["model"])
    names = [(ours, theirs) for ours, theirs, _ in _layout(config["model"], 0, 0)]
    renamed = {theirs: tensors[ours] for ours, theirs in names}
    renamed["lm_head.weight"] = tensors.get("lm_head.weight", tensors["embedding.weight"])
    with new_folder(folder):
        config_json |= _write_tokenizer(folder, tokenizer)
        _write_weights(folder, renamed, shard_bytes, libxlstm._C.save_safetensors)
        _write_json(folder, "config.json", config_json)
    return renamed
