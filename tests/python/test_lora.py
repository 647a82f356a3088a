"""Low-rank adapters (model.lora): what they compute, that they alone are trained, and what becomes of them."""

import json
import sys
from pathlib import Path

import pytest
import torch

import libxlstm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import TinyRun, program  # noqa: E402

LORA = ("model.embedding_dim=128", "model.lora.rank=3", "model.lora.alpha=6")
SETTINGS = {"model": {"lora": {"rank": 3, "alpha": 6}}}


def adapters(model):
    return {name for name, _ in model.named_parameters() if name.endswith(("lora_a", "lora_b"))}


def batch(seed=1):
    torch.manual_seed(seed)
    return torch.randint(256, (2, 17))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = TinyRun(tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("shared"), steps=12, every=6)
    run.shared = run.folder / "shared"
    run.train("model.embedding_dim=128", check=0)
    return run


@pytest.fixture
def tune(base, tmp_path):
    """A run that adapts the weights of `base`."""
    run = TinyRun(tmp_path / "tune", base.shared, steps=40, every=10)
    return run, (*LORA, f"train.init_from={base.path}")


def test_fresh_adapters_change_nothing_and_learn_alone(base):
    model, plain, tokens = libxlstm.load(base.path, settings=SETTINGS), libxlstm.load(base.path), batch()
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], plain(tokens)[0])
    names = adapters(model)
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(min(parameter.shape) == 3 for name, parameter in model.named_parameters() if name in names)
    assert any("proj_up.lora_a" in name for name in names) and not any("gate" in name or "embedding" in name for name in names)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.param_groups(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model.loss(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == names


def test_adapters_are_the_product_that_they_stand_for(base):
    """The gradient of a map's adapters follows from that of its weight: y = (W + alpha / rank B A) x."""
    model, plain, tokens = libxlstm.load(base.path, settings=SETTINGS), libxlstm.load(base.path), batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.02)
        weights = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            if name.endswith("lora_a"):
                up = model.get_parameter(name.replace("lora_a", "lora_b"))
                weights[name.replace("lora_a", "weight")] += 6 / 3 * up @ parameter
    ours, theirs = model.loss(tokens[:, :-1], tokens[:, 1:]), plain.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    for name in adapters(model):
        stem, which = name.rsplit(".", 1)
        down, up, gradient = (*(model.get_parameter(f"{stem}.lora_{x}") for x in "ab"), plain.get_parameter(f"{stem}.weight").grad)
        expected = 2 * (up.T @ gradient if which == "lora_a" else gradient @ down.T)
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=2e-3, atol=1e-6, msg=name)
    merged = model.merge_lora()
    assert not adapters(merged) and all(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no adapters"):
        merged.merge_lora()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_weights_are_rounded_and_adapters_are_not(base, dtype, tmp_path):
    model, tokens = libxlstm.load(base.path, dtype=dtype, settings=SETTINGS), batch()
    names = adapters(model)
    assert {parameter.dtype for name, parameter in model.named_parameters() if name in names} == {torch.float32}
    assert all(parameter.requires_grad == (name in names) for name, parameter in model.named_parameters())
    optimizer = torch.optim.AdamW(model.param_groups(), lr=1e-2)
    first = None
    for _ in range(8):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first - 0.05
    with torch.no_grad():
        merged, logits = model.merge_lora(), model(tokens)[0]
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
        assert (merged(tokens)[0] - logits).norm() < 0.05 * logits.norm()
    model.save(tmp_path / "saved")
    again = libxlstm.load(tmp_path / "saved", dtype=dtype)
    assert adapters(again) == names
    with torch.no_grad():
        assert torch.equal(again(tokens)[0], logits)


def test_fresh_adapters_alone_are_drawn(base, tmp_path):
    torch.manual_seed(5)
    first = libxlstm.load(base.path, settings=SETTINGS)
    second, behind = libxlstm.load(base.path, settings=SETTINGS), torch.get_rng_state()
    drawn = [name for name in adapters(first) if name.endswith("lora_a")]
    assert drawn
    for name in drawn:
        a, b = first.get_parameter(name), second.get_parameter(name)
        bound = a.size(1) ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound and not torch.equal(a, b), name
    first.save(tmp_path / "adapted")
    again = libxlstm.load(tmp_path / "adapted")
    assert torch.equal(torch.get_rng_state(), behind)
    assert all(torch.equal(again.get_parameter(name), first.get_parameter(name)) for name in adapters(first))
    torch.manual_seed(5)
    assert torch.equal(libxlstm.load(base.path, settings=SETTINGS).get_parameter(drawn[0]), first.get_parameter(drawn[0]))


def kinds():
    """Every kind of model, small, with large linear maps."""
    for kind in ("xlstm", "xlstm_large", "llama", "gpt", "mamba", "rwkv4", "rwkv6", "hgrn", "gla", "retnet", "h3", "hyena"):
        yield {"kind": kind, "vocab_size": 256, "embedding_dim": 128, "num_blocks": 2, "num_heads": 4, "lora": {"rank": 3}}


@pytest.mark.parametrize("settings", list(kinds()), ids=lambda settings: settings["kind"])
def test_every_adapter_counts_in_every_kind(settings):
    torch.manual_seed(1)
    model, tokens = libxlstm.make_model({"model": settings}).eval(), batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.02)
        merged = model.merge_lora()
        torch.testing.assert_close(merged(tokens)[0], model(tokens)[0], rtol=1e-3, atol=1e-3)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_a_merged_model_is_a_model_with_the_tokenizer(base):
    class Mine(libxlstm.Model):
        def __init__(self, core, more):
            super().__init__(core)
            self.more = more

    model = Mine(libxlstm.load(base.path, settings=SETTINGS)._core, 1)
    merged = model.merge_lora()
    assert type(merged) is libxlstm.Model and merged.tokenizer.decode([97]) == "a"


def test_activations_may_be_computed_again(base):
    gradients = []
    for again in (False, True):
        torch.manual_seed(3)
        model, tokens = libxlstm.load(base.path, settings={"model": {**SETTINGS["model"], "activation_checkpointing": again}}), batch()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_trainer_adapts_and_leaves_the_rest(base, tune, tmp_path):
    run, options = tune
    shown = run.train(*options, "--dry-run", check=0).stdout
    described = json.loads(run.train(*options, "--describe", check=0).stdout)
    plain = json.loads(base.train("model.embedding_dim=128", f"train.max_steps={run.steps}", "--describe", check=0).stdout)
    assert "trained   " in shown and "all tensors fit" in shown
    assert described["parameters"] - plain["parameters"] == described["parameters_trained"] < 0.2 * plain["parameters"]
    assert plain["parameters_trained"] == plain["parameters"]
    assert plain["training_flops"] > described["training_flops"] > 0.6 * plain["training_flops"]
    text = run.train(*options, check=0).stdout
    assert "starting with the weights of" in text and "computes something else" not in text
    model, before = libxlstm.load(run.path), libxlstm.load(base.path)
    names = adapters(model)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert all(model.get_parameter(name).abs().sum() > 0 for name in names)
    optimizer = run.path / "ckpt" / "step-00000040" / "optim-rank00000.safetensors"
    assert optimizer.stat().st_size < 0.5 * (optimizer.parent / "model.safetensors").stat().st_size
    losses = [json.loads(line)["val/loss"] for line in (run.path / "metrics.jsonl").read_text().splitlines() if "val/loss" in line]
    assert losses[-1] < [m["val/loss"] for m in base.metrics() if "val/loss" in m][-1]
    model.merge_lora().save(tmp_path / "merged")
    texts = [program("xlstm-generate", folder, "--prompt", "the ", "--greedy", "--max-new-tokens", 30, check=0).stdout
             for folder in (run.path, tmp_path / "merged")]
    assert texts[0] == texts[1]
    for folder in (run.path, tmp_path / "merged"):
        program("xlstm-eval", folder, "--json", tmp_path / "eval.json", check=0)
        assert json.loads((tmp_path / "eval.json").read_text())["loss"] == pytest.approx(losses[-1], rel=0.05)


def test_another_scale_of_adapters_that_were_trained_is_told(base, tune, capfd):
    run, options = tune
    options = (*options, "optim.warmup_steps=0")
    run.train(*options, "train.max_steps=2", check=0)
    first, told = f"train.init_from={run.path}", "trained with model.lora.alpha=6.0 (here 3.0); the tensors fit, but"
    for setting, warned in (("model.lora.alpha=3", True), ("model.dropout=0.4", False)):
        assert (told in run.train(*options, first, setting, "run.name=on", "--dry-run", check=0).stderr) == warned
    error = run.train(*options, "model.lora.alpha=3", check=2).stderr  # it would go on
    assert "model.lora.alpha: 3.0 now" in error
    on = run.train(*options, "train.max_steps=3", "model.dropout=0.4", check=0).stdout
    assert "changed since then: model.dropout 0.1 -> 0.4" in on
    capfd.readouterr()
    libxlstm.load(run.path, settings={"model": {"lora": {"alpha": 3}}})
    assert told in capfd.readouterr().err
    libxlstm.load(run.path, settings={"model": {"dropout": 0.4}})
    assert capfd.readouterr().err == ""


def test_an_interrupted_run_has_the_same_adapters(base, tune):
    run, options = tune
    run.train(*options, check=0)
    expected = run.fingerprint()
    other = TinyRun(run.folder.parent / "other", base.shared, steps=40, every=10)
    other.interrupt(15, *options)
    other.train(*options, check=0)
    assert other.fingerprint() == expected


def test_what_cannot_be(base, tune, tmp_path):
    run, options = tune
    for small in (("model.embedding_dim=32",), ("model.kind=lstm", "data.reset_state_at_document=false", "model.slstm_at=[]")):
        for dry in ((), ("--dry-run",)):
            error = run.train("model.lora.rank=4", f"train.init_from={base.path}", *small, *dry, check=2).stderr
            assert "lora.rank" in error and "64 channels" in error
    with pytest.raises(libxlstm.Error, match="lora.rank"):
        libxlstm.make_model({"model": {"embedding_dim": 32, "lora": {"rank": 4}}})
    error = run.train(*LORA, check=2).stderr
    assert "model.lora.rank" in error and "train.init_from" in error
    run.train(*options, check=0)
    error = base.train("model.embedding_dim=128", f"train.init_from={run.path}", f"run.out_dir={tmp_path}", check=4).stderr
    assert "lora_a" in error and "merge_lora" in error
    error = run.train(*options, "model.lora.rank=4", "run.name=wider", f"train.init_from={run.path}", check=4).stderr
    assert "lora_a has shape (3," in error
