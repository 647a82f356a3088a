"""xlstm-train with train.init_from: a new run with the weights of another one, and with nothing else of it."""

import json
import re
import shutil
import signal

import pytest
import torch
from test_distributed import TWO_MICRO_BATCHES, together
from test_train import CONFIG, PROGRAM, corpus, fingerprint, losses, one_line_error, records, setup, train  # noqa: F401

import libxlstm

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")

ONE_STEP = ["train.max_steps=1", "optim.warmup_steps=0"]
NO_CHANGE = [*ONE_STEP, "optim.learning_rate=1e-300", "optim.min_lr=0"]  # of a float32


@pytest.fixture(scope="module")
def given(tmp_path_factory, corpus):  # noqa: F811
    """The folder of a run of 12 steps, which has the checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("given")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(out=folder / "runs", text=corpus / "text.txt", cache=corpus / "cache"))
    done = train(config)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo"


def newest(given):
    return given / "ckpt" / "step-00000012"


def header(run):
    return json.loads((run / "run.json").read_text())


def same_weights(folder, other):
    first, second = (libxlstm.load(each, device="cpu").state_dict() for each in (folder, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_starts_with_exactly_these_weights(setup, given):  # noqa: F811
    config, run = setup
    done = train(config, f"train.init_from={given}", *NO_CHANGE)
    assert done.returncode == 0, done.stderr
    assert same_weights(run, newest(given)) and not same_weights(run, given / "ckpt" / "step-00000008")
    held_out = [[r["val/loss"] for r in records(folder) if "val/loss" in r][-1] for folder in (run, given)]
    assert held_out[0] == held_out[1]
    name = f"{newest(given)} (step 12)"
    assert f"starting with the weights of {name}\n" in done.stdout and name in (run / "run.log").read_text()
    assert header(run)["first_weights"] == name and header(given)["first_weights"] == ""
    assert [r["first_weights"] for r in records(run) if r.get("event") == "start"] == [name]


def test_step_and_data_begin_anew(setup, given, corpus):  # noqa: F811
    config, run = setup
    done = train(config, f"train.init_from={newest(given)}", "data.shuffle=false", *ONE_STEP)
    assert done.returncode == 0, done.stderr
    text = (corpus / "text.txt").read_bytes()
    windows = torch.tensor([list(text[16 * i:16 * i + 17]) for i in range(4)])
    with torch.no_grad():
        expected = libxlstm.load(newest(given), device="cpu").loss(windows[:, :-1], windows[:, 1:]).item()
    first = next(r for r in records(run) if "train/loss" in r)
    assert first["step"] == 1 and first["train/loss"] == pytest.approx(expected, rel=1e-4)
    state = json.loads((run / "ckpt" / "step-00000001" / "trainer.json").read_text())
    assert (state["step"], state["samples_consumed"], state["tokens"]) == (1, 4, 64)


def test_a_model_without_optimizer_gives_the_same_run(setup, given, tmp_path):  # noqa: F811
    """As imported ones are: so nothing of the optimizer of a checkpoint is taken."""
    config, run = setup
    alone = tmp_path / "model"
    libxlstm.load(given, device="cpu").save(alone)
    for name, source in (("demo", given), ("alone", alone)):
        done = train(config, f"run.name={name}", f"train.init_from={source}", "train.max_steps=4")
        assert done.returncode == 0, done.stderr
    assert f"starting with the weights of {alone}\n" in done.stdout
    assert losses(run) == losses(run.parent / "alone") and len(losses(run)) == 4
    assert fingerprint(run, 4) == fingerprint(run.parent / "alone", 4)


def test_its_settings_as_a_base(given, tmp_path):
    run = given.parent / "tuned"
    config = tmp_path / "tuned.yaml"
    config.write_text(f"base: {given}/config.yaml\nrun: {{name: tuned}}\ntrain: {{init_from: {given}}}\n")
    done = train(config, *NO_CHANGE)
    assert done.returncode == 0, done.stderr
    assert same_weights(run, newest(given))


@pytest.mark.parametrize("settings, differences, fix", [
    (["model.vocab_size=300"], {"has shape (256,16), the model's is (300,16)": 2}, "model.vocab_size=256 (here 300)"),
    (["model.embedding_dim=32"], {"has shape (256,16), the model's is (256,32)": 1}, "model.embedding_dim=16 (here 32)"),
    (["model.num_blocks=3"], {"blocks.2.": None}, "model.num_blocks=2 (here 3)"),
    (["model.num_blocks=1", "model.slstm_at=[]"], {"blocks.1.": None},
     "model.num_blocks=2 (here 1), model.slstm_at=[1] (here [])"),
])
def test_tensors_that_do_not_fit_are_counted_and_the_first_named(setup, given, settings, differences, fix):  # noqa: F811
    config, run = setup
    for dry in ([], ["--dry-run"]):
        message = one_line_error(train(config, *dry, f"train.init_from={given}", *settings), 4)
        assert f"{newest(given)}/model.safetensors: does not fit the model (" in message and message.endswith(fix)
        counts = [int(re.search(rf"(\d+) {what}", message)[1]) for what in ("missing", "unexpected", "of another shape")]
        named = [message.count(what) for what in (" is missing", " is not in the model", " has shape ")]
        told = min(3, sum(counts))
        assert sum(named) == told > 0 and (f" and {sum(counts) - 3} more; use" in message) == (sum(counts) > 3)
        for what, count in differences.items():
            assert message.count(what) == (count or told), message
    assert not run.exists()


def test_folders_that_are_none(setup, given, tmp_path):  # noqa: F811
    config, run = setup
    for dry in ([], ["--dry-run"]):
        for source, code, expected in ((tmp_path / "missing", 2, f"train.init_from: {tmp_path}/missing: no such folder"),
                                       (config, 2, "a file"), (tmp_path, 4, "MANIFEST.json")):
            message = one_line_error(train(config, *dry, f"train.init_from={source}"), code)
            assert expected in message and str(source) in message
    assert not run.exists()


def test_a_run_is_not_its_own_source(setup):  # noqa: F811
    config, run = setup
    assert train(config, "train.max_steps=4").returncode == 0
    for source in (run, run / "ckpt" / "step-00000004"):
        assert "another run.name" in one_line_error(train(config, "--fresh", f"train.init_from={source}"), 2)
    assert (run / "ckpt").exists() and not (run.parent / "demo.old-1").exists()


@pytest.fixture
def of_words(tmp_path):
    """A model of the same shapes that was trained with another tokenizer."""
    (tmp_path / "words.json").write_text("{}")  # never read, only compared
    other = tmp_path / "other"
    libxlstm.make_model({"model": {"vocab_size": 256, "embedding_dim": 16, "num_blocks": 2, "num_heads": 2, "slstm_at": [1]},
                         "data": {"tokenizer": str(tmp_path / "words.json")}}).save(other)
    return other


@pytest.fixture
def damaged(given, tmp_path):
    """A copy of the run in which a bit of the newest weights is flipped, as the file of these."""
    source = tmp_path / "source"
    shutil.copytree(given, source)
    weights = newest(source) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return weights


def test_another_tokenizer_is_refused(setup, of_words):  # noqa: F811
    config, _ = setup
    other = of_words
    for dry in ([], ["--dry-run"]):
        message = one_line_error(train(config, *dry, f"train.init_from={other}"), 2)
        assert "other words" in message and f"data.tokenizer={other}" in message


def test_settings_that_fit_but_compute_something_else_are_a_warning(setup, given):  # noqa: F811
    config, _ = setup
    for dry in (["--dry-run"], []):
        for setting, warned in (("model.output_logit_soft_cap=30", True), ("model.dropout=0.5", False)):
            done = train(config, *dry, f"train.init_from={given}", setting, *ONE_STEP, "--fresh")
            assert done.returncode == 0, done.stderr
            assert ("model.output_logit_soft_cap=0.0 (here 30.0)" in done.stderr) == warned
            assert ("computes something else" in done.stderr) == warned


def test_a_damaged_checkpoint(setup, damaged):  # noqa: F811
    config, _ = setup
    assert f"{damaged}: damaged" in one_line_error(train(config, f"train.init_from={damaged.parent}"), 4)
    done = train(config, f"train.init_from={damaged.parents[2]}", *ONE_STEP)
    assert done.returncode == 0 and f"{damaged}: damaged" in done.stderr
    assert "step-00000008 (step 8)" in done.stdout


def test_a_fresh_start_that_fails_leaves_the_old_run(setup, given, of_words, damaged):  # noqa: F811
    config, run = setup
    assert train(config, "train.max_steps=4").returncode == 0
    for source, code, expected in ((of_words, 2, "other words"), (damaged.parent, 4, f"{damaged}: damaged")):
        assert expected in one_line_error(train(config, "--fresh", f"train.init_from={source}"), code)
        assert [path.name for path in run.parent.iterdir()] == ["demo"]
    assert (run / "ckpt" / "step-00000004" / "MANIFEST.json").exists()
    differs = "model.output_logit_soft_cap=30"
    assert train(config, "--fresh", f"train.init_from={given}", differs, *ONE_STEP).returncode == 0
    log = (run / "run.log").read_text()
    assert "moved the earlier run" in log and "starting with the weights of" in log and "soft_cap=0.0 (here 30.0)" in log


def test_killed_and_resumed(setup, given, tmp_path):  # noqa: F811
    config, run = setup
    source = tmp_path / "source"
    shutil.copytree(given, source)
    option = f"train.init_from={source}"
    assert train(config, option, "run.name=whole").returncode == 0
    assert train(config, option, failpoint="trainer.step_end:2").returncode == -signal.SIGKILL
    assert not list((run / "ckpt").iterdir())  # nothing saved yet: it starts with the given weights again
    assert train(config, option, failpoint="trainer.step_end:6").returncode == -signal.SIGKILL
    shutil.rmtree(source)
    assert "train.init_from would not be read" in train(config, option, "--dry-run").stdout
    done = train(config, option)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train.init_from is not read") == 1 and "starting with the weights" not in done.stdout
    assert losses(run) == losses(run.parent / "whole") and len(losses(run)) == 12
    assert fingerprint(run, 12) == fingerprint(run.parent / "whole", 12)
    assert header(run)["first_weights"] == f"{newest(source)} (step 12)"
    assert "no such folder" in one_line_error(train(config, option, "--fresh"), 2)
    assert fingerprint(run, 12) == fingerprint(run.parent / "whole", 12)  # nothing was moved


def test_dry_run_tries_them(setup, given):  # noqa: F811
    config, run = setup
    option = f"train.init_from={given}"
    done = train(config, option, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"\nweights     of {newest(given)} (step 12); all tensors fit\n" in done.stdout
    assert not run.exists()
    assert train(config, option, *ONE_STEP).returncode == 0
    first = next(r for r in records(run) if "train/loss" in r)["train/loss"]
    assert f"one step    loss {first:.4f}," in done.stdout


def test_several_processes(setup, given):  # noqa: F811
    config, run = setup
    option = f"train.init_from={given}"
    assert train(config, option, TWO_MICRO_BATCHES, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, option)] == [0, 0]
    assert losses(run) == losses(run.parent / "alone") and fingerprint(run, 12) == fingerprint(run.parent / "alone", 12)
    ended = together(config, "run.name=bad", f"train.init_from={given}/missing")
    assert [status for _, _, status in ended] == [2, 6] and "no such folder" in ended[0][1]
