"""xLSTM checkpoints of transformers, in and out: the same logits and the same greedy text from the same weights."""

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
from libxlstm import convert, convert_hf
from libxlstm.scoring import Judge

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
if not hasattr(transformers, "xLSTMForCausalLM"):
    pytest.skip("this transformers has no xLSTM", allow_module_level=True)

VOCABULARY = 90
SHARDS = {"max_shard_size": "200KB"}
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16,
    "autocast_kernel_dtype": "float32", "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}


def make_model(**changes):
    """transformers' model with random weights everywhere, gates and norms included."""
    torch.manual_seed(1)
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith("bias") else 0.15)
    return model


def run_tool(*arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = convert.main(list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def import_(source, out, *more):
    return run_tool("--from", "hf", "--weights", source, "--out", out, *more)


def check_logits(theirs, ours, tolerance=1e-4):
    torch.manual_seed(2)
    ids = torch.randint(VOCABULARY, (2, 45))
    with torch.no_grad():
        expected, (logits, _) = theirs(ids, use_cache=False).logits.float(), ours(ids)
    assert expected.abs().max() > 0.5
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def greedy(model, ids, count):
    with torch.no_grad():
        logits, state = model(ids)
        for _ in range(count):
            token = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            logits, state = model(token, state)
    return ids


def write_tokenizer(folder):
    vocabulary = {"<|endoftext|>": 0, **{chr(code): code - 31 for code in range(32, 32 + VOCABULARY - 1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"gate_soft_cap": 4.0, "output_logit_soft_cap": 2.0, "norm_eps": 1e-3, "eps": 1e-2}, SHARDS),
        ({"qk_dim_factor": 1.0, "v_dim_factor": 2.0, "ffn_proj_factor": 1.71, "ffn_round_up_to_multiple_of": 24}, {}),
        ({"hidden_size": 96, "num_heads": 4}, {}),  # q and v of 48 and 96, or 64 and 128 without the xlstm package
    ],
)
def test_import_gives_the_same_logits_and_text(changes, options, tmp_path):
    theirs = make_model(**changes)
    theirs.save_pretrained(tmp_path / "theirs", **options)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == bool(options)
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    narrow = theirs.backbone.blocks[0].mlstm_layer.q.weight.shape[0] % 64 != 0
    assert done.returncode == 0 and ("rounds up to" in done.stderr) == narrow and (narrow or done.stderr == "")
    assert f" {theirs.num_parameters()} parameters" in done.stdout
    ours = libxlstm.load(tmp_path / "ours")
    check_logits(theirs, ours)
    ids = torch.randint(1, VOCABULARY, (1, 21))
    theirs.generation_config.eos_token_id = None
    if "hidden_size" not in changes:
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    else:  # transformers makes its states of the larger widths, whatever the layers have: without states
        expected = ids
        for _ in range(24):
            with torch.no_grad():
                expected = torch.cat([expected, theirs(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(ours, ids, 24), expected)


def test_tokenizer_comes_along(tmp_path):
    theirs = make_model()
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    done = import_(tmp_path / "theirs", tmp_path / "ours", "--seq-len", 77)
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(libxlstm.load(tmp_path / "ours").settings)["data"]
    assert data["seq_len"] == 77
    judge = Judge.load(tmp_path / "ours", device="cpu")
    assert judge.max_length == 77 and judge.tokenizer.start_id == 0
    with torch.no_grad():  # what begins a text counts for all of it
        expected = theirs(torch.tensor([[0, 5, 6]])).logits.double().log_softmax(-1)[0]
    assert judge.score([([0], [5, 6])])[0][0] == pytest.approx((expected[0, 5] + expected[1, 6]).item(), rel=1e-4)
    build = Path(next(iter(torch.ops.loaded_libraries))).parent.parent
    program = build / "bin" / "xlstm-generate"
    if not program.exists():
        pytest.skip(f"{program} is not built")
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json")).encode("a cell").ids
    (tmp_path / "theirs" / "tokenizer.json").unlink()  # the folder stands alone
    command = [program, tmp_path / "ours", "--prompt", "a cell", "--greedy", "--max-new-tokens", "9", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLSTM_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0].tolist()
    text = "".join(chr(token + 31) for token in expected if token)
    assert done.stdout == text + "\n"


def test_half_precision_is_kept(tmp_path):
    theirs = make_model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", **SHARDS)
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    stored = safetensors_torch.load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    check_logits(theirs.float(), libxlstm.load(tmp_path / "ours"))


def test_fused_weights(tmp_path):
    theirs = make_model()
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = safetensors_torch.load_file(tmp_path / "theirs" / "model.safetensors")
    for block in range(2):
        for layer, fused, parts in (
            ("mlstm_layer", "qkv_opreact", ("q", "k", "v", "ogate_preact")),
            ("mlstm_layer", "ifgate_preact", ("igate_preact", "fgate_preact")),
            ("ffn", "proj_up_gate_z", ("proj_up_gate", "proj_up")),
        ):
            prefix = f"backbone.blocks.{block}.{layer}."
            for kind in ("weight", "bias") if fused == "ifgate_preact" else ("weight",):
                tensors[f"{prefix}{fused}.{kind}"] = torch.cat([tensors.pop(f"{prefix}{part}.{kind}") for part in parts])
    safetensors_torch.save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    change_config(tmp_path / "theirs", weight_mode="fused")
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    check_logits(theirs, libxlstm.load(tmp_path / "ours"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"colour": 3}, "config: unknown keys colour; where they change nothing"),
        ({"model_type": "mamba"}, "model_type: 'mamba' cannot be imported, expected: xlstm"),
        ({"use_bias": True}, "use_bias"),
        ({"add_out_norm": False}, "add_out_norm"),
        ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, "its input gate is a sigmoid"),
        ({"embedding_dim": 256}, "hidden_size: 128 is not embedding_dim 256"),
        ({"gate_soft_cap": 0}, "gate_soft_cap: expected a positive number or null"),
        ({"norm_eps": "small"}, "norm_eps: expected a number"),
        ({"quantization_config": {"bits": 4}}, "unknown keys quantization_config"),
        ({"add_qk_norm": True}, "add_qk_norm: True cannot be imported"),
    ],
)
def test_what_would_change_the_function_is_refused(changes, part):
    with pytest.raises(convert.ConvertError) as caught:
        convert_hf.read_config({"model_type": "xlstm", "hidden_size": 128, **changes})
    assert part in str(caught.value) and caught.value.code == 2


def test_null_means_no_cap():
    model, fused = convert_hf.read_config({"model_type": "xlstm", "gate_soft_cap": None, "embedding_dim": None})
    assert model["gate_soft_cap"] == 0 and model["output_logit_soft_cap"] == 30 and not fused
    assert model["embedding_dim"] == 4096 and model["num_blocks"] == 32


# config.json of NX-AI/xLSTM-7b as copies of it have it, with the settings of its first code.
THE_7B_MODEL = {
    "_name_or_path": "NX-AI/xLSTM-7b", "architectures": ["xLSTMForCausalLM"], "model_type": "xlstm",
    "add_embedding_dropout": False, "add_forward_backend_padding": False, "add_out_norm": True, "add_post_blocks_norm": True,
    "add_post_norm": False, "add_qk_norm": False, "autocast_kernel_dtype": "bfloat16", "cell_norm_eps": 1e-06,
    "chunk_size": 64, "chunkwise_kernel": "chunkwise--triton_xl_chunk", "embedding_dim": 4096, "eps": 1e-06,
    "ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64, "force_bos_token_insert": True, "gate_soft_cap": 15.0,
    "head_dim": 512, "igate_bias_init_range": -10.0, "inference_state_dtype": "float32", "mlstm_round_up_to_multiple_of": 64,
    "mode": "inference", "norm_eps": 1e-06, "norm_reduction_force_float32": True, "num_blocks": 32, "num_heads": 8,
    "output_logit_soft_cap": 30.0, "qk_dim_factor": 0.5, "return_last_states": True,
    "sequence_kernel": "native_sequence__triton", "step_kernel": "triton", "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.48.0.dev0", "use_bias": False, "use_cache": True,
    "v_dim_factor": 1.0, "vocab_size": 50304, "weight_mode": "single",
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}


def test_the_7b_model_is_that_of_the_configuration_file():
    root = Path(libxlstm.__file__).resolve().parent.parent
    if not (root / "configs").is_dir():
        pytest.skip("not the source tree")
    expected = yaml.safe_load((root / "configs" / "model" / "xlstm_7b.yaml").read_text())["model"]
    assert expected.pop("add_out_norm") is True
    assert convert_hf.read_config({"model_type": "xlstm"})[0] == expected
    assert convert_hf.read_config(THE_7B_MODEL)[0] == expected


def test_damaged_folders(tmp_path):
    make_model().save_pretrained(tmp_path / "theirs", **SHARDS)
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "theirs" / index["weight_map"]["backbone.blocks.1.mlstm_layer.q.weight"]
    tensors = safetensors_torch.load_file(shard)
    q = tensors.pop("backbone.blocks.1.mlstm_layer.q.weight")
    safetensors_torch.save_file({"surplus": q, **tensors}, shard)
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 4 and "not in its files: backbone.blocks.1.mlstm_layer.q.weight" in done.stderr
    shard.unlink()
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 4 and shard.name in done.stderr
    done = import_(tmp_path / "nothing", tmp_path / "ours")
    assert done.returncode == 2 and f"{tmp_path / 'nothing'}: no such folder" in done.stderr
    assert not (tmp_path / "ours").exists()


def test_weights_that_do_not_fit(tmp_path):
    make_model().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    name = "backbone.blocks.0.mlstm_layer.q.weight"
    safetensors_torch.save_file({**tensors, name: torch.zeros(32, 128)}, path)
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 4 and f"{name} has a width of 32, config.qk_dim_factor stands for 64" in done.stderr
    safetensors_torch.save_file({**tensors, name: torch.zeros(64, 128, dtype=torch.int8)}, path)
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 4 and "torch.int8" in done.stderr
    tensors["surplus"] = tensors.pop("backbone.out_norm.weight")
    safetensors_torch.save_file(tensors, path)
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    assert "missing: backbone.out_norm.weight" in done.stderr and "unknown: surplus" in done.stderr


YAML = """
model:
  kind: xlstm_large
  vocab_size: 90
  embedding_dim: 128
  num_blocks: 2
  num_heads: 2
  norm_eps: 1.0e-4
"""


def make_ours(folder, yaml_text=YAML):
    torch.manual_seed(5)
    model = libxlstm.make_model(yaml_text)
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, model.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.save(folder)
    return model


@pytest.mark.parametrize("more", ["", "  tie_weights: true\n  output_logit_soft_cap: 3.0\n  qk_dim_factor: 1.0\n",
                                  "  lora: {rank: 3}\n", "  lora: {rank: 3, base: int8}\n"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10**5])
def test_export_gives_the_same_logits(more, shard_bytes, tmp_path):
    ours = make_ours(tmp_path / "ours", YAML + more)
    convert_hf.export(str(tmp_path / "ours"), str(tmp_path / "theirs"), shard_bytes)
    sharded = (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert sharded == (shard_bytes < 10**6)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    check_logits(theirs.eval(), ours)
    done = import_(tmp_path / "theirs", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    check_logits(theirs, libxlstm.load(tmp_path / "again"))


def test_export_with_a_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    make_ours(tmp_path / "ours", YAML + f"data:\n  tokenizer: {tmp_path}\n")
    done = run_tool("--to", "hf", "--weights", tmp_path / "ours", "--out", tmp_path / "theirs")
    assert done.returncode == 0, done.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer.encode("a cell") == [66, 1, 68, 70, 77, 77]
    assert tokenizer.eos_token_id == 0 and tokenizer.decode([66, 1, 68]) == "a c"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert model.config.eos_token_id == 0
    done = run_tool("--to", "hf", "--weights", tmp_path / "ours", "--out", tmp_path / "theirs")
    assert done.returncode == 4 and "is not empty" in done.stderr


CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
# What transformers says besides the model, as the 7B model's files say it.
BESIDES = {
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "autocast_kernel_dtype": "bfloat16",
    "force_bos_token_insert": True, "max_inference_chunksize": 4096,
}


def write_theirs(folder, **changes):
    """A model of transformers with a tokenizer that has a template for chats, and with settings of its own for generation."""
    theirs = make_model(**{**BESIDES, **changes})
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=1, max_new_tokens=77)
    theirs.save_pretrained(folder)
    letters = {chr(code): code - 30 for code in range(32, 32 + VOCABULARY - 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0, "<|padding|>": 1, **letters}, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    given = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps(given))  # as older versions write it
    return theirs


def check_besides(folder, source):
    """What goes with a model of transformers is that of `source`: a folder, or its name -> content."""
    kept = {path.name: path.read_bytes() for path in source.iterdir()} if isinstance(source, Path) else source
    names = {"chat_template.jinja", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"} & set(kept)
    assert len(names) == 4
    for name in names:
        assert (folder / name).read_bytes() == kept[name], name
    config, expected = json.loads((folder / "config.json").read_text()), json.loads(kept["config.json"])
    assert {key: config.get(key) for key in (*BESIDES, "use_cache", "step_kernel", "chunkwise_kernel")} == {
        key: expected.get(key) for key in (*BESIDES, "use_cache", "step_kernel", "chunkwise_kernel")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("<|padding|>", 1, 0)
    assert tokenizer.apply_chat_template([{"role": "a", "content": "hi"}], tokenize=False) == "a: hi<|endoftext|>"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == 2 and model.generation_config.max_new_tokens == 77


def test_what_surrounds_the_model_comes_back(tmp_path):
    write_theirs(tmp_path / "theirs")
    done = import_(tmp_path / "theirs", tmp_path / "ours")
    assert done.returncode == 0 and done.stderr == ""
    source = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    for path in (tmp_path / "theirs").iterdir():
        path.unlink()  # the folder stands alone
    model = libxlstm.load(tmp_path / "ours")
    model.save(tmp_path / "saved")
    lora = libxlstm.load(tmp_path / "saved", settings={"model": {"lora": {"rank": 2}}})
    lora.merge_lora().save(tmp_path / "merged")
    (tmp_path / "ours").rename(tmp_path / "moved")
    for name in ("moved", "saved", "merged"):
        done = run_tool("--to", "hf", "--weights", tmp_path / name, "--out", tmp_path / f"{name}-hf")
        assert done.returncode == 0, done.stderr
        check_besides(tmp_path / f"{name}-hf", source)
    # A folder of the run is none of transformers: its weights have other names.
    assert not (tmp_path / "saved" / "config.json").exists()
    done = import_(tmp_path / "saved-hf", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    again, moved = (json.loads((tmp_path / name / "imported.json").read_text()) for name in ("again", "moved"))
    assert again == moved and moved["bos_id"] == 0


def program(name):
    path = Path(next(iter(torch.ops.loaded_libraries))).parent.parent / "bin" / name
    if not path.exists():
        pytest.skip(f"{path} is not built")

    def run(*arguments):
        return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True,
                              env=os.environ | {"XLSTM_PYTHON": sys.executable})

    return run


@pytest.mark.parametrize("more", [[], ["model.lora.rank=2"]])
def test_training_carries_it(more, tmp_path):
    train = program("xlstm-train")
    write_theirs(tmp_path / "theirs")
    assert import_(tmp_path / "theirs", tmp_path / "ours").returncode == 0
    source = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    for path in (tmp_path / "theirs").iterdir():
        path.unlink()
    (tmp_path / "t.txt").write_text("a cell keeps what the gate lets in, and " * 40)
    (tmp_path / "tune.yaml").write_text(f"""\
base: {tmp_path}/ours/config.yaml
run: {{name: tuned, out_dir: {tmp_path}, device: cpu, num_threads: 1}}
data: {{text: {tmp_path}/t.txt, cache_dir: {tmp_path}/cache, seq_len: 16}}
train: {{init_from: {tmp_path}/ours, max_steps: 2, global_batch_size: 2}}
optim: {{warmup_steps: 0}}
sample: {{prompts: ["a cell"], every: 2, max_new_tokens: 2}}
log: {{tensorboard: false, plot: false}}
""")
    done = train(tmp_path / "tune.yaml", *more)
    assert done.returncode == 0, done.stderr
    done = train(tmp_path / "tune.yaml", *more, "train.max_steps=3")  # goes on from its own checkpoint
    assert done.returncode == 0, done.stderr
    for checkpoint in ("ckpt/step-00000002", "ckpt/step-00000003"):
        out = tmp_path / Path(checkpoint).name
        done = run_tool("--to", "hf", "--weights", tmp_path / "tuned" / checkpoint, "--out", out)
        assert done.returncode == 0, done.stderr
        check_besides(out, source)


def test_a_token_stands_before_prompts_where_the_source_wants_one(tmp_path):
    theirs = write_theirs(tmp_path / "theirs")
    assert import_(tmp_path / "theirs", tmp_path / "ours").returncode == 0
    tokenizer = libxlstm.load(tmp_path / "ours").tokenizer
    ids = [tokenizer.encode(letter)[0] for letter in "a cell"]
    assert tokenizer.encode("a cell") == ids and tokenizer.bos_id == tokenizer.start_id == 0
    assert tokenizer.encode_prompt("a cell") == [0, *ids] == tokenizer.encode_prompt("<|endoftext|>a cell")
    assert tokenizer.encode_prompt("") == [0]
    generate = program("xlstm-generate")
    for options, prompt in (([], [0, *ids]), (["--no-bos"], ids)):
        done = generate(tmp_path / "ours", "--prompt", "a cell", "--greedy", "--max-new-tokens", 9, "--device", "cpu", *options)
        assert done.returncode == 0 and f"prompt: {len(prompt)} tokens" in done.stderr, done.stderr
        theirs.generation_config.eos_token_id = 0
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0].tolist()
        assert done.stdout == "".join(chr(token + 30) for token in expected if token > 1) + "\n"


@pytest.mark.parametrize("wants", ["force_bos_token_insert", "add_bos_token", "post_processor", None])
def test_which_sources_want_a_token_before_prompts(wants, tmp_path):
    write_theirs(tmp_path / "theirs", force_bos_token_insert=wants == "force_bos_token_insert")
    if wants == "add_bos_token":
        path = tmp_path / "theirs" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))
    if wants == "post_processor":
        path = tmp_path / "theirs" / "tokenizer.json"
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.save(str(path))
    assert import_(tmp_path / "theirs", tmp_path / "ours").returncode == 0
    tokenizer = libxlstm.load(tmp_path / "ours").tokenizer
    first = [0] if wants else []
    assert tokenizer.bos_id == (0 if wants else -1)
    assert tokenizer.encode_prompt("a") == [*first, *tokenizer.encode("a")] and tokenizer.encode("a") != []
    assert tokenizer.encode_prompt("") == [0]


def test_a_run_is_no_folder_of_transformers(tmp_path):
    make_ours(tmp_path / "ours")
    done = import_(tmp_path / "ours", tmp_path / "again")
    assert done.returncode == 2 and f"{tmp_path / 'ours'}: a run or a checkpoint" in done.stderr and "--to hf" in done.stderr
    (tmp_path / "run" / "ckpt").mkdir(parents=True)
    assert "a run or a checkpoint" in import_(tmp_path / "run", tmp_path / "again").stderr
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("kind: xlstm_large", "kind: xlstm"), "model.kind xlstm: transformers knows"),
        (("num_heads: 2", "num_heads: 2\n  gate_soft_cap: 0.0"), "caps its gates"),
        (("num_heads: 2", "num_heads: 2\n  add_out_norm: false"), "add_out_norm true"),
        (("num_heads: 2", "num_heads: 2\n  qk_dim_factor: 0.25"), "model.qk_dim_factor: a width of 32; "
         "transformers rounds it up to 64 and has no place for these weights. Train what is to go there with "
         "model.qk_dim_factor=0.5, or with a model.embedding_dim of which 0.25 is a multiple of 64"),
    ],
)
def test_models_that_transformers_has_not(change, part, tmp_path):
    make_ours(tmp_path / "ours", YAML.replace(*change))
    done = run_tool("--to", "hf", "--weights", tmp_path / "ours", "--out", tmp_path / "theirs")
    assert done.returncode == 2 and part in done.stderr
    assert not (tmp_path / "theirs").exists()
