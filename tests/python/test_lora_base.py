"""Adapters beside weights that are kept in bfloat16 or 8 bits (model.lora.base): what is rounded, what is computed, and that runs
of xlstm-train do with it all that they do without."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import together
from test_lora import LORA, adapters, base, batch, kinds  # noqa: F401

import libxlstm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import TinyRun, program  # noqa: E402

ops = torch.ops.xlstm
KEPT = {"bfloat16": torch.bfloat16, "int8": torch.int8}
every_base = pytest.mark.parametrize("kept", KEPT)


def settings(kept, **more):
    return {"model": {"lora": {"rank": 3, "alpha": 6, "base": kept}, **more}}


def adapted(model):
    """Names of the weights beside adapters."""
    return {name.replace("lora_a", "weight") for name in adapters(model) if name.endswith("lora_a")}


def rounded(weight, kept):
    return ops.quantize_int8(weight) if kept == "int8" else weight.bfloat16()


def draw_adapters(model, seed=4):
    """Adapters that have an effect."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in adapters(model):
                parameter.normal_(0, 0.05)


@pytest.fixture
def tune(base, tmp_path):  # noqa: F811
    """tune(kept, name) -> a run that adapts the weights of `base`, and its settings."""

    def run(kept, name="tune", steps=30):
        run = TinyRun(tmp_path / name, base.shared, steps=steps, every=10)
        return run, (*LORA, f"train.init_from={base.path}", f"model.lora.base={kept}")

    return run


@every_base
def test_the_weights_beside_adapters_are_rounded_and_nothing_else(base, kept):  # noqa: F811
    model, plain = libxlstm.load(base.path, settings=settings(kept)), dict(libxlstm.load(base.path).named_parameters())
    assert adapted(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in adapters(model))
        if name in adapted(model):
            assert torch.equal(parameter, rounded(plain[name], kept)), name
        else:
            assert parameter.dtype == torch.float32, name
            assert name in adapters(model) or torch.equal(parameter, plain[name]), name
    assert libxlstm.load(base.path, dtype=torch.bfloat16, settings=settings(kept)).get_parameter("lm_head.weight").dtype == \
        torch.bfloat16


def test_weights_are_not_read_before_they_are_loaded(base):  # noqa: F811
    """Fresh memory, which large models do not touch, is NaN here."""
    ways = [(dtype, kept) for dtype in (None, torch.bfloat16, torch.int8) for kept in ("float32", *KEPT)]
    expected = [libxlstm.load(base.path, dtype=dtype, settings=settings(kept)) for dtype, kept in ways]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = [libxlstm.load(base.path, dtype=dtype, settings=settings(kept)) for dtype, kept in ways]
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(found, expected, strict=True):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert a.dtype == b.dtype and (name.endswith("lora_a") or torch.equal(a, b)), name
            assert not a.is_floating_point() or a.isfinite().all(), name


@every_base
@pytest.mark.parametrize("autocast", [False, True])
def test_it_computes_what_the_rounded_weights_stand_for(base, kept, autocast):  # noqa: F811
    """In the dtype of the vectors: float32, or autocast's."""
    model, wide, tokens = libxlstm.load(base.path, settings=settings(kept)), libxlstm.load(base.path, settings=settings("float32")), batch()
    draw_adapters(model), draw_adapters(wide)
    with torch.no_grad():
        for name in adapted(model):
            ours, theirs = model.get_parameter(name), wide.get_parameter(name)
            theirs.copy_(ops.dequantize_int8(ours, theirs.size(1)) if kept == "int8" else ours)
    results = []
    for each in (model, wide):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = each.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(each.get_parameter(name).grad for name in sorted(adapters(model)))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.any() and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every_base
@pytest.mark.parametrize("again", [False, True])
def test_recomputed_blocks_and_copies(base, kept, again):  # noqa: F811
    model, tokens = libxlstm.load(base.path, settings=settings(kept, activation_checkpointing=again)), batch()
    draw_adapters(model)
    models = (model, copy.deepcopy(model))
    losses = [each.loss(tokens[:, :-1], tokens[:, 1:]) for each in models]
    for each, loss in zip(models, losses, strict=True):
        loss.backward()
        assert torch.equal(loss, losses[0])
        for (name, ours), theirs in zip(each.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
            assert name not in adapters(model) or torch.equal(ours.grad, theirs.grad), name


@every_base
@pytest.mark.parametrize("of_kind", list(kinds()), ids=lambda given: given["kind"])
def test_every_kind_learns_beside_rounded_weights(of_kind, kept):
    torch.manual_seed(1)
    given = {**of_kind, "lora": {"rank": 3, "base": kept}}
    model, tokens = libxlstm.make_model({"model": given}), batch()
    draw_adapters(model)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert {model.get_parameter(name).dtype for name in adapted(model)} == {KEPT[kept]}
    assert all(model.get_parameter(name).grad.any() for name in adapters(model))
    stack = libxlstm.BlockStack(**{name: value for name, value in given.items() if name != "vocab_size"}).eval()
    assert stack(torch.randn(2, 5, 128))[0].dtype == torch.float32


@every_base
def test_saved_and_merged(base, kept, tmp_path):  # noqa: F811
    model, tokens = libxlstm.load(base.path, settings=settings(kept)), batch()
    draw_adapters(model)
    with torch.no_grad():
        logits, merged = model(tokens)[0], model.merge_lora()
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
        torch.testing.assert_close(merged(tokens)[0], logits, rtol=1e-4, atol=1e-4)
        model.save(tmp_path / "saved")
        again = libxlstm.load(tmp_path / "saved")
        assert torch.equal(again(tokens)[0], logits)
    assert {again.get_parameter(name).dtype for name in adapted(model)} == {KEPT[kept]}
    for dtype in (torch.bfloat16, torch.int8):
        small = libxlstm.load(tmp_path / "saved", dtype=dtype)
        assert small.get_parameter("lm_head.weight").dtype == torch.bfloat16
        with torch.no_grad():
            assert (small(tokens)[0] - logits).norm() < 0.05 * logits.norm()


@every_base
def test_a_run_of_the_trainer(base, tune, kept, tmp_path):  # noqa: F811
    run, options = tune(kept)
    wide, wide_options = tune("float32", "wide")
    described, of_wide = (json.loads(each.train(*given, "--describe", check=0).stdout)
                          for each, given in ((run, options), (wide, wide_options)))
    assert "all tensors fit" in run.train(*options, "--dry-run", check=0).stdout
    run.train(*options, check=0)
    wide.train(*wide_options, check=0)

    stored, given = (load_file(each.path / "ckpt" / f"step-{each.steps:08d}" / "model.safetensors") for each in (run, base))
    model = libxlstm.load(run.path)
    for name, tensor in stored.items():
        if name in adapters(model):
            assert tensor.dtype == torch.float32 and tensor.any(), name
        else:
            assert torch.equal(tensor, rounded(given[name], kept) if name in adapted(model) else given[name]), name
    assert f"base: {kept}" in (run.path / "config.yaml").read_text()

    bytes_of = [sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) for tensors in
                (stored, load_file(wide.path / "ckpt" / f"step-{wide.steps:08d}" / "model.safetensors"))]
    saved = bytes_of[1] - bytes_of[0]
    assert saved > 0.25 * bytes_of[1] and of_wide["memory_bytes"] - described["memory_bytes"] == saved
    same = ("parameters", "parameters_trained", "forward_flops_per_token", "training_flops", "activation_bytes")
    assert all(described[key] == of_wide[key] for key in same)

    ours, theirs = ([float.fromhex(loss) for _, loss in each.losses()] for each in (run, wide))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)
    judged = [m["val/loss"] for m in run.metrics() if "val/loss" in m]
    assert judged[-1] < [m["val/loss"] for m in base.metrics() if "val/loss" in m][-1]
    program("xlstm-eval", run.path, "--json", tmp_path / "eval.json", check=0)
    text = program("xlstm-generate", run.path, "--prompt", "the ", "--greedy", "--max-new-tokens", 30, "--no-echo", check=0).stdout
    assert text == bytes(model.generate(list(b"the "), 30, temperature=0)).decode(errors="replace") + "\n"
    model.merge_lora().save(tmp_path / "merged")
    program("xlstm-eval", tmp_path / "merged", "--json", tmp_path / "merged.json", check=0)
    losses = [json.loads((tmp_path / name).read_text())["loss"] for name in ("eval.json", "merged.json")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for dtype in ("bfloat16_weights", "int8_weights"):
        program("xlstm-eval", run.path, "--dtype", dtype, "--json", tmp_path / "small.json", check=0)
        assert json.loads((tmp_path / "small.json").read_text())["loss"] == pytest.approx(losses[0], rel=0.02)


def test_under_autocast_bfloat16_costs_nothing(tune):
    """Where products are in bfloat16, weights of that dtype are the same as float32 ones that are rounded for each."""
    runs = []
    for kept in ("float32", "bfloat16"):
        run, options = tune(kept, kept)
        run.train(*options, "train.dtype=bfloat16", "model.activation_checkpointing=true", check=0)
        runs.append(run)
    assert runs[0].losses() == runs[1].losses()
    assert [m["val/loss_hex"] for m in runs[0].metrics() if "val/loss" in m] == \
        [m["val/loss_hex"] for m in runs[1].metrics() if "val/loss" in m]


@every_base
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_in_the_same_bits(base, tune, kept, dtype):  # noqa: F811
    more = (f"train.dtype={dtype}", "train.carry_state=true", "ckpt.keep_best=true", "eval.every=7")
    run, options = tune(kept, "whole", steps=40)
    run.train(*options, *more, check=0)
    other, options = tune(kept, "stopped", steps=40)
    other.interrupt(15, *options, *more)
    shown = other.train(*options, *more, "--dry-run", check=0).stdout
    assert "would not be read" in shown and "one step" in shown
    other.train(*options, *more, check=0)
    assert other.fingerprint() == run.fingerprint()
    assert os.readlink(other.path / "ckpt" / "best") == os.readlink(run.path / "ckpt" / "best")


@every_base
def test_two_processes_are_one_with_two_micro_batches(tune, kept):
    runs = []
    for name, more in (("one", ()), ("two", ()), ("shared", ("optim.shard=true",))):
        run, options = tune(kept, name, steps=12)
        options = (*options, *more, "model.dropout=0.0", "train.micro_batch_size=2")
        if name == "one":
            run.train(*options, check=0)
        else:
            ended = together(run.config, *options)
            assert [status for _, _, status in ended] == [0, 0], ended
        runs.append(run.fingerprint())
    for name in ("losses", "model.safetensors", "optim-rank00000.safetensors"):
        assert runs[0][name] == runs[1][name] == runs[2][name]


def test_weights_that_have_8_bits_are_taken_as_they_are(base, tune, tmp_path):  # noqa: F811
    small = libxlstm.load(base.path, dtype=torch.int8)
    small.save(tmp_path / "small")
    given, (run, options) = dict(small.named_parameters()), tune("int8")
    options = (*options, f"train.init_from={tmp_path / 'small'}")
    run.train(*options, check=0)
    model = libxlstm.load(run.path)
    for name, parameter in model.named_parameters():
        if name not in adapters(model):
            assert torch.equal(parameter, given[name].to(parameter.dtype)), name
    for kept in ("float32", "bfloat16"):
        error = run.train(*options, f"model.lora.base={kept}", "run.name=other", check=4).stderr
        assert "8 bits" in error and "model.lora.base=int8" in error and "rounded from" in error
    error = base.train("model.embedding_dim=128", f"train.init_from={tmp_path / 'small'}", f"run.out_dir={tmp_path}", check=4).stderr
    assert "8 bits" in error and "model.lora.base=int8" in error


def test_a_run_may_start_with_another_ones_adapters(tune):
    first, options = tune("float32", "first")
    first.train(*options, check=0)
    run, options = tune("int8", "second", steps=10)
    text = run.train(*options, f"train.init_from={first.path}", check=0).stderr
    assert "model.lora.base=float32 (here int8)" in text
    assert float.fromhex(run.losses()[0][1]) < float.fromhex(first.losses()[0][1])


def test_what_cannot_be(base, tune, tmp_path):  # noqa: F811
    run, options = tune("int8")
    for dry in ((), ("--dry-run",)):
        error = run.train("model.embedding_dim=128", "model.lora.base=int8", f"train.init_from={base.path}", *dry, check=2).stderr
        assert "model.lora.base" in error and "model.lora.rank" in error
        error = run.train(*LORA, "model.lora.base=int8", *dry, check=2).stderr
        assert "model.lora.rank" in error and "train.init_from" in error
        error = run.train(*options, "model.lora.base=int4", *dry, check=2).stderr
        assert "model.lora.base" in error and "float32" in error and "int8" in error
    with pytest.raises(libxlstm.Error, match="model.lora.base"):
        libxlstm.make_model({"model": {"embedding_dim": 128, "lora": {"base": "int8"}}})
    run.train(*options, check=0)
    error = run.train(*options, "model.lora.base=bfloat16", check=2).stderr
    assert "model.lora.base" in error and "was trained with int8" in error
    error = run.train(*options, "model.mlstm.proj_factor=1.0", "run.name=other", check=4).stderr
    assert "has shape (512,128), the model's is (256,128)" in error
    broken = libxlstm.load(base.path)
    with torch.no_grad():
        broken.get_parameter("blocks.0.mlstm.proj_up.weight")[3, 4] = float("inf")
    broken.save(tmp_path / "broken")
    error = run.train(*options, f"train.init_from={tmp_path / 'broken'}", "run.name=other", check=4).stderr
    assert "model.safetensors: blocks.0.mlstm.proj_up.weight" in error and "inf or NaN" in error
