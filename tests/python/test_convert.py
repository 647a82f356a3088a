"""The xlstm package's small models, imported and exported: the same logits from the same weights."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import libxlstm
from libxlstm import convert, convert_xlstm
from libxlstm.scoring import Judge, Tokenizer, find_tokenizer

xlstm = pytest.importorskip("xlstm")
safetensors_torch = pytest.importorskip("safetensors.torch")
from xlstm.blocks.mlstm.block import mLSTMBlockConfig  # noqa: E402
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig  # noqa: E402
from xlstm.blocks.slstm.block import sLSTMBlockConfig  # noqa: E402
from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCellConfig  # noqa: E402
from xlstm.blocks.slstm.layer import sLSTMLayerConfig  # noqa: E402
from xlstm.components.feedforward import FeedForwardConfig  # noqa: E402
from xlstm.xlstm_lm_model import xLSTMLMModel, xLSTMLMModelConfig  # noqa: E402

VOCABULARY, LENGTH = 23, 24


def make_config(**changes):
    """Nested dicts, as the package's users write them in YAML."""
    config = {
        "vocab_size": VOCABULARY,
        "embedding_dim": 32,
        "num_blocks": 4,
        "context_length": LENGTH,
        "slstm_at": [1, 2],
        "mlstm_block": {"mlstm": {"num_heads": 4, "conv1d_kernel_size": 4, "qkv_proj_blocksize": 4}},
        "slstm_block": {
            "slstm": {"num_heads": 4, "backend": "vanilla", "dtype": "float32", "conv1d_kernel_size": 4},
            "feedforward": {"proj_factor": 1.3, "act_fn": "gelu"},
        },
    }
    for name, value in changes.items():
        section, *rest = name.split("__")
        if rest:
            target = config[section]
            for key in rest[:-1]:
                target = target[key]
            target[rest[-1]] = value
        else:
            config[section] = value
    return config


def make_model(config):
    """The package's model with random weights everywhere, recurrent ones and norms included."""
    blocks = {}
    if config.get("mlstm_block"):
        blocks["mlstm_block"] = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(**config["mlstm_block"]["mlstm"]))
    if config.get("slstm_block"):
        blocks["slstm_block"] = sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(**config["slstm_block"]["slstm"]),
            feedforward=FeedForwardConfig(**config["slstm_block"]["feedforward"]),
        )
    plain = {key: value for key, value in config.items() if not key.endswith("_block")}
    model = xLSTMLMModel(xLSTMLMModelConfig(**plain, **blocks)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" not in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def state_dict_of(model):
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def run_tool(folder, config, tensors, *more):
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    safetensors_torch.save_file(tensors, folder / "weights.safetensors")
    arguments = [
        "--from", "xlstm", "--config", str(folder / "config.yaml"), "--weights", str(folder / "weights.safetensors"),
        "--out", str(folder / "out"), *more,
    ]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = convert.main(arguments)
    return subprocess.CompletedProcess(arguments, code, stderr=stderr.getvalue())


def check_logits(model, folder):
    imported = libxlstm.load(folder)
    torch.manual_seed(2)
    ids = torch.randint(VOCABULARY, (3, LENGTH))
    with torch.no_grad():
        expected = model(ids)
        logits, _ = imported(ids)
        assert (logits - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
        assert expected.abs().max() > 0.1
        # ... and one token at a time
        state = None
        for t in range(LENGTH):
            step, state = imported(ids[:, t : t + 1], state)
            assert (step[:, 0] - expected[:, t]).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slstm_at": [], "bias": True, "slstm_block": None},
        {"slstm_at": "all", "mlstm_block": None, "add_post_blocks_norm": False},
        {"slstm_block__slstm__conv1d_kernel_size": 4, "slstm_block__slstm__function": "lstm"},
        {"slstm_block__feedforward__act_fn": "swish", "slstm_block__feedforward__bias": True},
        {"slstm_block__feedforward__act_fn": "relu^2"},
        {"mlstm_block__mlstm__proj_factor": 1.5, "mlstm_block__mlstm__round_proj_up_dim_up": False,
         "mlstm_block__mlstm__round_proj_up_to_multiple_of": 32},
        {"slstm_block__slstm__group_norm_weight": False},
    ],
)
def test_logits_are_the_packages(changes, tmp_path):
    config = make_config(**changes)
    model = make_model(config)
    done = run_tool(tmp_path, {"model": config} if changes else config, state_dict_of(model))
    assert done.returncode == 0, done.stderr
    check_logits(model, tmp_path / "out")


def test_command_line(tmp_path):
    config = make_config()
    model = make_model(config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    safetensors_torch.save_file(state_dict_of(model), tmp_path / "weights.safetensors")
    command = [sys.executable, "-m", "libxlstm.convert", "--from", "xlstm", "--config", "config.yaml", "--weights"]
    command += ["weights.safetensors", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(libxlstm.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    count = sum(parameter.numel() for parameter in model.parameters())
    assert done.stdout.startswith("out: ") and f" {count} parameters" in done.stdout
    check_logits(model, tmp_path / "out")


def test_context_length_and_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<|endoftext|>": 0, **{letter: index for index, letter in enumerate("abcdefghij", 1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.save(str(tmp_path / "small.json"))
    config = make_config()
    tensors = state_dict_of(make_model(config))
    done = run_tool(tmp_path, config, tensors, "--tokenizer", str(tmp_path / "small.json"))
    assert done.returncode == 0 and done.stderr == ""
    data = yaml.safe_load(libxlstm.load(tmp_path / "out").settings)["data"]
    assert data["seq_len"] == LENGTH and data["tokenizer"] == str(tmp_path / "small.json")
    assert Tokenizer(find_tokenizer(str(tmp_path / "out"), data["tokenizer"])).encode("cab") == [3, 1, 2]
    (tmp_path / "small.json").unlink()  # the folder has its own copy
    assert Judge.load(tmp_path / "out", device="cpu").tokenizer.encode("cab") == [3, 1, 2]

    done = run_tool(tmp_path, config, tensors, "--seq-len", "7", "--tokenizer", "no-such-file")
    assert done.returncode == 3 and "no-such-file" in done.stderr
    done = run_tool(tmp_path, config, tensors, "--seq-len", "7")
    assert done.returncode == 0 and done.stderr == "", "23 tokens: no text model"
    assert yaml.safe_load(libxlstm.load(tmp_path / "out").settings)["data"]["seq_len"] == 7


def test_more_tokens_than_bytes_want_a_tokenizer(tmp_path):
    config = make_config(vocab_size=300)
    tensors = state_dict_of(make_model(config))
    done = run_tool(tmp_path, config, tensors)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: no tokenizer was given") and "300" in done.stderr and "--tokenizer" in done.stderr
    done = run_tool(tmp_path, config, tensors, "--tokenizer", "bytes")
    assert done.returncode == 0 and done.stderr == ""
    config = make_config(vocab_size=200)
    done = run_tool(tmp_path, config, state_dict_of(make_model(config)), "--tokenizer", "bytes")
    assert done.returncode == 2 and "bytes has 256 tokens, the model 200" in done.stderr


def test_tied_weights(tmp_path):
    config = make_config(tie_weights=True)
    model = make_model(config)
    tensors = state_dict_of(model)
    done = run_tool(tmp_path, config, tensors)
    assert done.returncode == 0, done.stderr
    check_logits(model, tmp_path / "out")
    assert "lm_head.weight" not in dict(libxlstm.load(tmp_path / "out").named_parameters())

    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    done = run_tool(tmp_path, config, tensors)
    assert done.returncode == 4 and "lm_head.weight is not the embedding" in done.stderr


def to_cuda_layout(model, config, tensors):
    """What the package's CUDA backend would have saved for the same function."""
    cell_config = sLSTMCellConfig(hidden_size=32, num_heads=4, backend="cuda", dtype="float32")
    cuda = sLSTMCell_cuda(cell_config, skip_backend_init=True)
    for index in config["slstm_at"]:
        cell = model.xlstm_block_stack.blocks[index].xlstm.slstm_cell
        prefix = f"xlstm_block_stack.blocks.{index}.xlstm.slstm_cell."
        kernel = cell._recurrent_kernel_int2ext(cell._recurrent_kernel_.detach())
        tensors[prefix + "_recurrent_kernel_"] = cuda._recurrent_kernel_ext2int(kernel).contiguous()
        tensors[prefix + "_bias_"] = cuda._bias_ext2int(cell._bias_int2ext(cell._bias_.detach())).contiguous()
    return tensors


@pytest.mark.parametrize("by_flag", [False, True])
def test_cuda_layout(by_flag, tmp_path):
    config = make_config()
    model = make_model(config)
    tensors = to_cuda_layout(model, config, state_dict_of(model))
    if not by_flag:
        config["slstm_block"]["slstm"]["backend"] = "cuda"
    done = run_tool(tmp_path, config, tensors, *(["--slstm-layout", "cuda"] if by_flag else []))
    assert done.returncode == 0, done.stderr
    check_logits(model, tmp_path / "out")


def test_wrong_layout_is_refused_with_the_way_out(tmp_path):
    config = make_config()
    model = make_model(config)
    done = run_tool(tmp_path, config, to_cuda_layout(model, config, state_dict_of(model)))
    assert done.returncode == 4
    assert "_recurrent_kernel_" in done.stderr and "--slstm-layout" in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_and_unknown_weights_are_named(tmp_path):
    config = make_config()
    tensors = state_dict_of(make_model(config))
    name = "xlstm_block_stack.blocks.0.xlstm.learnable_skip"
    tensors["surplus.weight"] = tensors.pop(name)
    done = run_tool(tmp_path, config, tensors)
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    assert f"missing: {name}" in done.stderr and "unknown: surplus.weight" in done.stderr


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"colour": 3}, "unknown keys colour"),
        ({"mlstm_block__mlstm__colour": 3}, "config.mlstm_block.mlstm: unknown keys colour"),
        ({"embedding_dim": "wide"}, "embedding_dim: expected a number"),
        ({"slstm_block__slstm__num_heads": 2}, "mLSTM has 4 heads and sLSTM 2"),
        ({"slstm_block__feedforward__act_fn": "selu"}, "act_fn: 'selu' cannot be imported"),
        ({"slstm_block__slstm__gradient_recurrent_clipval": 0.5}, "gradient_recurrent_clipval"),
        ({"slstm_block": None}, "slstm_block: missing"),
        ({"slstm_block__feedforward": None}, "feedforward: missing"),
    ],
)
def test_configuration_errors(changes, part):
    with pytest.raises(convert.ConvertError, match="(?s).*") as caught:
        convert_xlstm.read_config(make_config(**changes))
    assert part in str(caught.value) and caught.value.code == 2


def test_unreadable_files(tmp_path, capsys):
    assert convert.main(["--from", "xlstm", "--config", str(tmp_path / "no.yaml"), "--weights", "x", "--out", "y"]) == 2
    (tmp_path / "config.yaml").write_text(json.dumps(make_config()))
    (tmp_path / "weights.safetensors").write_bytes(b"not a safetensors file")
    files = ["--config", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "weights.safetensors")]
    assert convert.main(["--from", "xlstm", *files, "--out", str(tmp_path / "out")]) == 4
    assert "write the state_dict with safetensors.torch.save_file" in capsys.readouterr().err
    files[-1] = str(tmp_path / "absent.safetensors")
    assert convert.main(["--from", "xlstm", *files, "--out", str(tmp_path / "out")]) == 4
    told = capsys.readouterr().err
    assert "absent.safetensors" in told and "save_file" not in told


def export(folder, out, *more):
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = convert.main(["--to", "xlstm", "--weights", str(folder), "--out", str(out), *more])
    return code, output.getvalue()


def make_ours(**changes):
    torch.manual_seed(3)
    settings = {"vocab_size": VOCABULARY, "embedding_dim": 32, "num_blocks": 3, "slstm_at": [1], **changes}
    model = libxlstm.make_model({"model": settings, "data": {"seq_len": LENGTH}}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slstm_at": [], "tie_weights": True, "mlstm": {"proj_factor": 1.5, "round_proj_up_to_multiple_of": 32}},
        {"slstm_at": [0, 1, 2], "add_out_norm": False, "slstm": {"conv1d_kernel_size": 0, "cell": "lstm"}},
        {"bias": True, "feed_forward": {"act_fn": "relu2"}},
    ],
)
def test_exported_logits_are_ours(changes, tmp_path):
    ours = make_ours(**changes)
    ours.save(str(tmp_path / "ours"))
    code, said = export(tmp_path / "ours", tmp_path / "theirs")
    assert code == 0, said
    config = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())
    assert config["context_length"] == LENGTH
    theirs = make_model(config)
    tensors = safetensors_torch.load_file(tmp_path / "theirs" / "model.safetensors")
    theirs.load_state_dict(tensors, strict=True)
    check_logits(theirs, tmp_path / "ours")

    done = run_tool(tmp_path, config, tensors)  # and back
    assert done.returncode == 0, done.stderr
    back = dict(libxlstm.load(tmp_path / "out").named_parameters())
    assert back.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(back[name], parameter, rtol=1e-6, atol=1e-6)


def test_export_in_the_other_layout(tmp_path):
    make_ours().save(str(tmp_path / "ours"))
    assert export(tmp_path / "ours", tmp_path / "cuda", "--slstm-layout", "cuda")[0] == 0
    assert export(tmp_path / "ours", tmp_path / "vanilla")[0] == 0
    config = yaml.safe_load((tmp_path / "vanilla" / "config.yaml").read_text())
    model = make_model(config)
    model.load_state_dict(safetensors_torch.load_file(tmp_path / "vanilla" / "model.safetensors"))
    tensors = safetensors_torch.load_file(tmp_path / "cuda" / "model.safetensors")
    for name, expected in to_cuda_layout(model, config, state_dict_of(model)).items():
        assert torch.equal(tensors[name], expected), name
    assert yaml.safe_load((tmp_path / "cuda" / "config.yaml").read_text())["slstm_block"]["slstm"]["backend"] == "cuda"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kind": "llama", "slstm_at": []}, "model.kind: 'llama'"),
        ({"mlstm": {"up_projection": "post"}}, "model.mlstm.up_projection: 'post'; the xlstm package has 'pre' alone"),
        ({"mlstm": {"conv1d_kernel_size": 0}}, "model.mlstm.conv1d_kernel_size: 0"),
        ({"slstm": {"cell": "slstm_expf"}}, "model.slstm.cell: slstm_expf"),
        ({"feed_forward": {"gated": False}}, "model.feed_forward.gated: False"),
    ],
)
def test_what_the_package_does_not_have_is_named(changes, part, tmp_path):
    make_ours(**changes).save(str(tmp_path / "ours"))
    code, said = export(tmp_path / "ours", tmp_path / "theirs")
    assert code == 2 and part in said and not (tmp_path / "theirs").exists()


def test_export_keeps_what_is_there_and_merges_adapters(tmp_path):
    ours = make_ours(embedding_dim=64, lora={"rank": 2})
    ours.save(str(tmp_path / "ours"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    code, said = export(tmp_path / "ours", tmp_path / "full")
    assert code == 4 and "not empty" in said and (tmp_path / "full" / "mine").read_text() == "mine"
    assert export(tmp_path / "ours", tmp_path / "theirs")[0] == 0
    theirs = make_model(yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text()))
    theirs.load_state_dict(safetensors_torch.load_file(tmp_path / "theirs" / "model.safetensors"))
    ours.merge_lora().save(str(tmp_path / "merged"))
    check_logits(theirs, tmp_path / "merged")
