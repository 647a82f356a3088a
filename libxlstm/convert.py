"""Weights of other xLSTM code as a checkpoint folder, and back.

    python -m libxlstm.convert --from hf --weights xLSTM-7b --out runs/xlstm-7b
    python -m libxlstm.convert --to hf --weights runs/mine --out mine-hf
    python -m libxlstm.convert --from xlstm --config config.yaml --weights in.safetensors --tokenizer tokenizer.json --out dir
    python -m libxlstm.convert --to xlstm --weights runs/mine --out dir

hf     a folder of Hugging Face transformers, model_type xlstm (the architecture of the 7B model): convert_hf.py
xlstm  the authors' PyPI package, its small models (xLSTMLMModel): convert_xlstm.py
"""

import argparse
import json
import sys

from libxlstm.convert_common import EXIT_CONFIG, EXIT_WEIGHTS, ConvertError
from libxlstm.convert_xlstm import LAYOUTS, convert_xlstm
from libxlstm.tokenizer_worker import IMPORTED

NUM_BYTES = 256


def _load_xlstm(config_path, weights_path):
    try:
        import yaml
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConvertError(EXIT_CONFIG, f"{error}; install it with: pip install pyyaml safetensors") from error
    try:
        with open(config_path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ConvertError(EXIT_CONFIG, f"{config_path}: {' '.join(str(error).split())}") from error
    try:
        tensors = load_file(weights_path)
    except OSError as error:
        raise ConvertError(EXIT_WEIGHTS, f"{weights_path}: {' '.join(str(error).split())}") from error
    except Exception as error:  # safetensors raises types of its own for a broken file
        what = f"no safetensors file ({' '.join(str(error).split())})"
        how = "write the state_dict with safetensors.torch.save_file"
        raise ConvertError(EXIT_WEIGHTS, f"{weights_path}: {what}; {how}") from error
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = config["model"]
    return config, tensors


def _import_xlstm(options):
    """(model settings, tensors, data settings that the source gives, its config.json)."""
    config, tensors = _load_xlstm(options.config, options.weights)
    model, converted = convert_xlstm(config, tensors, options.slstm_layout)
    length = config.get("context_length")
    return model, converted, {"seq_len": length} if isinstance(length, int) and length > 0 else {}, None


def _import_hf(options):
    from libxlstm import convert_hf
    from libxlstm.scoring import has_tokenizer

    config, tensors = convert_hf.read_folder(options.weights)
    model, converted = convert_hf.convert_hf(config, tensors)
    for key, width, wider in convert_hf.rounded_widths(model):
        print(f"warning: config.{key}: the weights have a width of {width}, which transformers rounds up to {wider}: such "
              "a model does not generate there, and --to hf cannot write it", file=sys.stderr)
    data = {"seq_len": convert_hf.SEQ_LEN, **convert_hf.DOCUMENTS}
    return model, converted, data | ({"tokenizer": options.weights} if has_tokenizer(options.weights) else {}), config


def _check_tokenizer(spec, vocab_size):
    """An unreadable tokenizer, or one of another model, must not go into the folder."""
    from libxlstm.scoring import ScoringError, Tokenizer

    try:
        size = Tokenizer(spec).vocab_size
    except ScoringError as error:
        raise ConvertError(error.code, str(error)) from error
    if size > vocab_size:
        raise ConvertError(EXIT_CONFIG, f"--tokenizer: {spec} has {size} tokens, the model {vocab_size}")


def _import(options):
    import yaml

    import libxlstm
    from libxlstm import convert_hf

    read = _import_hf if options.source == "hf" else _import_xlstm
    model, tensors, data, source = read(options)
    given = {"tokenizer": options.tokenizer, "seq_len": options.seq_len}
    data |= {key: value for key, value in given.items() if value is not None}
    if "tokenizer" in data:
        _check_tokenizer(data["tokenizer"], model["vocab_size"])
    elif model["vocab_size"] > NUM_BYTES:
        print(f"warning: no tokenizer was given: text will be read as bytes, but the model has {model['vocab_size']} tokens; "
              "say with --tokenizer what data.tokenizer takes", file=sys.stderr)
    try:
        tokenizer = libxlstm._C.read_tokenizer(data.get("tokenizer", "bytes"))
        if source is not None and tokenizer:
            tokenizer[IMPORTED] = json.dumps(convert_hf.imported(source, tokenizer), indent=2).encode()
            data["tokenizer"] = options.out  # what trains from it takes all that belongs to the tokenizer from there
        config = {"run": {"name": "imported"}, "model": model} | ({"data": data} if data else {})
        libxlstm._C.save_model_folder(options.out, yaml.safe_dump(config, sort_keys=False), tensors, tokenizer)
    except libxlstm.Error as error:
        raise ConvertError(error.code, str(error)) from error
    return tensors


def _export(options):
    import libxlstm
    from libxlstm import convert_hf, convert_xlstm
    from libxlstm.scoring import ScoringError

    try:
        if options.target == "hf":
            return convert_hf.export(options.weights, options.out)
        return convert_xlstm.export(options.weights, options.out, options.slstm_layout or "vanilla")
    except (libxlstm.Error, ScoringError) as error:
        raise ConvertError(error.code, str(error)) from error


def _parser():
    parser = argparse.ArgumentParser(prog="python -m libxlstm.convert", description=__doc__.splitlines()[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=["xlstm", "hf"], help="where the weights come from")
    way.add_argument("--to", dest="target", choices=["xlstm", "hf"], help="where they go")
    parser.add_argument("--weights", required=True,
                        help="xlstm: the state_dict, safetensors; hf: the folder with config.json; --to: a run or checkpoint")
    parser.add_argument("--config", help="xlstm: the package's configuration, YAML")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--tokenizer", metavar="SPEC",
                        help="what data.tokenizer takes: bytes, tokenizer.json, or a folder; hf: its own unless given")
    parser.add_argument("--seq-len", type=int, metavar="N",
                        help="tokens per sequence of the training, data.seq_len; xlstm: context_length, hf: 8192 unless given")
    parser.add_argument("--slstm-layout", choices=LAYOUTS,
                        help="xlstm: the backend whose layout the sLSTM's weights have; --from: slstm.backend of the "
                             "configuration unless given, --to: vanilla, which needs no GPU")
    return parser


def _check_options(parser, options):
    if (options.source == "xlstm") != (options.config is not None):
        parser.error("--config belongs to --from xlstm, which needs it")
    if options.slstm_layout and "xlstm" not in (options.source, options.target):
        parser.error("--slstm-layout belongs to --from xlstm and --to xlstm")
    if options.target and (options.tokenizer or options.seq_len):
        parser.error("--tokenizer and --seq-len belong to --from")


def main(arguments=None):
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_options(parser, options)
    try:
        tensors = _export(options) if options.target else _import(options)
    except (ConvertError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", EXIT_WEIGHTS if isinstance(error, OSError) else EXIT_CONFIG)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{options.out}: {len(tensors)} tensors, {count} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
