"""The best checkpoint (ckpt.keep_best) and the early end (eval.patience): what is kept, who takes it, and that a run which was
stopped, killed or fell back decides as one that was not."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from test_distributed import TWO_MICRO_BATCHES, together
from test_train import PROGRAM, corpus, fingerprint, losses, one_line_error, records, setup, train  # noqa: F401

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")

PATIENCE, EVERY = 3, 2


@pytest.fixture
def overfits(setup, corpus):  # noqa: F811
    """A run whose held-out loss falls and then rises: the text that is held out is like the other at first sight alone."""
    config, run = setup
    held_out = corpus / "held_out.txt"
    if not held_out.exists():
        held_out.write_text("".join(f"line of a text, {i}, small\n" for i in range(100)))
    config.write_text(config.read_text().replace("max_steps: 12", "max_steps: 80")
                      .replace("keep_last: 2", "keep_last: 1, keep_best: true")
                      .replace("every: 5, batches: 4", f"every: {EVERY}, batches: 0, patience: {PATIENCE}")
                      .replace("data: {", f"data: {{val_text: {held_out}, "))
    return config, run


def evaluations(run):
    """{step: exact loss}"""
    return {r["step"]: float.fromhex(r["val/loss_hex"]) for r in records(run) if "val/loss" in r}


def lowest(judged):
    return min(judged, key=lambda step: (judged[step], step))


def checkpoints(run):
    """Names in ckpt/, and what the link is to."""
    return sorted(path.name for path in (run / "ckpt").iterdir()), os.readlink(run / "ckpt" / "best")


def decisions(run):
    """All that a run has decided, and what of."""
    names, best = checkpoints(run)
    last = max(name for name in names if name.startswith("step-"))
    return (evaluations(run), [name for name in names if not name.startswith("old-")], best, losses(run),
            fingerprint(run, int(last[5:])), json.loads((run / "ckpt" / last / "trainer.json").read_text()))


@pytest.fixture
def whole(overfits):
    """The run that nothing happens to: (its decisions, step of the best evaluation, last step)."""
    config, run = overfits
    done = train(config, "run.name=whole")
    assert done.returncode == 0, done.stderr
    judged = evaluations(run.parent / "whole")
    best, last = lowest(judged), max(judged)
    assert 4 < best and last == best + PATIENCE * EVERY < 80, f"no example of an early end: {judged}"
    return decisions(run.parent / "whole"), best, last


def test_the_best_is_kept_and_the_run_ends_early(overfits):
    config, run = overfits
    done = train(config)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    judged = evaluations(run)
    best, last = lowest(judged), max(judged)
    assert last == best + PATIENCE * EVERY and list(judged) == list(range(EVERY, last + 1, EVERY))
    assert checkpoints(run) == (["best", f"step-{best:08d}", f"step-{last:08d}"], f"step-{best:08d}")
    assert f"step {last} | no lower held-out loss in {PATIENCE} evaluations: the run ends here (eval.patience)" in done.stdout
    assert re.search(rf"^lowest held-out loss: {judged[best]:.4f} at step {best}, {run}/ckpt/best$", done.stdout, re.M)
    assert [r["event"] for r in records(run) if "event" in r] == ["start", "early_stop", "end"]
    assert [r["step"] for r in records(run, "samples.jsonl")] == [last]
    rates = {r["step"]: r["train/lr"] for r in records(run) if "train/lr" in r}
    assert rates[last] > 1.5e-3, "the schedule is that of 80 steps"

    before = {path: path.lstat().st_mtime_ns for path in (run / "ckpt").rglob("*")}
    again = train(config)
    assert again.returncode == 0 and "step 1" not in again.stdout
    assert (f"this run is finished: step {last} of 80, no lower held-out loss in {PATIENCE} evaluations; train on with a "
            "larger eval.patience") in again.stdout
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]  # the best, and the result
    assert {path: path.lstat().st_mtime_ns for path in (run / "ckpt").rglob("*")} == before
    assert "this run is finished" in train(config, "--dry-run").stdout

    longer = train(config, "eval.patience=0", "train.max_steps=60")
    assert longer.returncode == 0 and max(losses(run)) == 60
    judged = evaluations(run)
    assert checkpoints(run)[1] == f"step-{lowest(judged):08d}"


def test_every_program_takes_the_link(overfits, whole, tmp_path):
    config, run = overfits
    _, best, _ = whole
    link, folder = run.parent / "whole" / "ckpt" / "best", run.parent / "whole" / "ckpt" / f"step-{best:08d}"

    def program(name, *arguments):
        done = subprocess.run([PROGRAM.parent / name, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done

    for given in (link, f"{link}/"):
        report = tmp_path / "report.json"
        done = program("xlstm-eval", given, "--json", report)
        assert f"{given} is {folder}\n" in done.stderr
        told = json.loads(report.read_text())
        assert told["checkpoint"] == str(folder)
        assert told["loss"] == pytest.approx(evaluations(run.parent / "whole")[best], rel=1e-6)  # of these very weights
    texts = [program("xlstm-generate", given, "--prompt", "line ", "--max-new-tokens", "8") for given in (link, folder)]
    assert texts[0].stdout == texts[1].stdout
    assert f"{link} is {folder}\n" in texts[0].stderr and " is " not in texts[1].stderr

    libxlstm = pytest.importorskip("libxlstm")
    model = libxlstm.load(link)
    assert model.folder == str(folder)
    for taken in (link, folder):  # it would no longer be the run's
        with pytest.raises(libxlstm.Error, match="choose another name"):
            model.save(taken)
    assert libxlstm.load(link).folder == str(folder)
    done = train(config, f"train.init_from={link}", "train.max_steps=2", "optim.warmup_steps=1")
    assert done.returncode == 0 and f"starting with the weights of {folder} (step {best})" in done.stdout, done.stderr
    assert json.loads((run / "run.json").read_text())["first_weights"] == f"{folder} (step {best})"


def test_killed_and_stopped_runs_decide_alike(overfits, whole):
    """Before and within the naming, after evaluations that are recorded and before ones that are not."""
    config, run = overfits
    expected, best, last = whole
    assert train(config, failpoint="trainer.step_end:3").returncode == -signal.SIGKILL
    assert checkpoints(run) == (["best", "step-00000002"], "step-00000002")
    assert train(config, failpoint="ckpt.best:4").returncode == -signal.SIGKILL
    assert checkpoints(run) == (["best", "best.tmp", "step-00000002", "step-00000004"], "step-00000002")
    assert train(config, "--dry-run").returncode == 0
    assert train(config, failpoint=f"trainer.raise_sigterm:{best - 1}").returncode == 75
    assert train(config, failpoint=f"ckpt.before_rename:{best}").returncode == -signal.SIGKILL
    assert train(config, failpoint=f"trainer.raise_sigterm:{best}").returncode == 75
    assert train(config, failpoint=f"ckpt.best:{best}").returncode == -signal.SIGKILL
    for step in (best + 2, last):  # saved, then evaluated by the start that follows
        assert train(config, failpoint=f"trainer.raise_sigterm:{step}").returncode == 75
        assert checkpoints(run)[1] == f"step-{best:08d}"
    done = train(config)
    assert done.returncode == 0 and "the run ends here" in done.stdout, done.stderr
    *found, state = decisions(run)
    *expected, expected_state = expected
    assert found == expected
    # The last checkpoint was written before its evaluation here.
    assert state == {**expected_state, "best_evaluation": {**expected_state["best_evaluation"], "last_step": last - EVERY,
                                                           "evaluations_since": PATIENCE - 1}}
    assert "this run is finished" in train(config).stdout and "this run is finished" in train(config, "--dry-run").stdout


def test_a_fall_back_to_an_earlier_checkpoint(overfits, whole):
    config, run = overfits
    expected, best, _ = whole
    kept = "ckpt.keep_last=99"
    assert train(config, kept, failpoint=f"trainer.step_end:{best + 1}").returncode == -signal.SIGKILL
    (run / "ckpt" / f"step-{best:08d}" / "model.safetensors").write_bytes(b"damaged")
    done = train(config, kept, failpoint=f"trainer.raise_sigterm:{best - 1}")  # the best of what is left, for now
    assert done.returncode == 75 and "falling back" in done.stderr
    earlier = {step: loss for step, loss in expected[0].items() if step < best}
    assert checkpoints(run)[1] == f"step-{lowest(earlier):08d}"
    assert (run / "ckpt" / "old-1" / f"step-{best:08d}").is_dir()
    assert train(config).returncode == 0
    assert decisions(run) == expected


def test_a_link_goes_with_what_it_names(overfits):
    """A run that goes back without keep_best writes the same steps anew, which were not judged."""
    config, run = overfits
    options = ("run.name=back", "ckpt.keep_every=4")
    done = train(config, *options)
    assert done.returncode == 0, done.stderr
    assert (run.parent / "back" / "ckpt" / "best").is_symlink()
    done = train(config, *options, "run.resume=step-00000004", "ckpt.keep_best=false", "optim.learning_rate=0.1", "eval.patience=0")
    assert done.returncode == 0, done.stderr
    assert not (run.parent / "back" / "ckpt" / "best").is_symlink()


def test_the_best_of_an_earlier_checkpoint_is_gone(overfits, whole):
    config, run = overfits
    expected, best, _ = whole
    # Of the steps before the best one the last alone is kept, which was not evaluated.
    assert train(config, "ckpt.keep_best=false", f"ckpt.keep_every={best - 1}", "ckpt.every=1",
                 failpoint=f"trainer.raise_sigterm:{best + 1}").returncode == 75
    done = train(config, f"--resume=step-{best - 1}")
    lost = lowest({step: loss for step, loss in expected[0].items() if step < best})
    assert f"at step {lost}, was not kept: the next lower one will be" in done.stdout, done.stdout + done.stderr
    assert decisions(run)[0] == expected[0] and checkpoints(run)[1] == f"step-{best:08d}"


def test_where_no_link_can_be_made(overfits, whole):
    """As on a file system without them: one warning, and the checkpoint is kept."""
    config, run = overfits
    _, best, last = whole
    (run / "ckpt" / "best" / "mine").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    done = train(config)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert f"{run}/ckpt/best cannot be made a link to the best checkpoint: " in warning
    names = sorted(path.name for path in (run / "ckpt").iterdir())
    assert names == ["best", f"step-{best:08d}", f"step-{last:08d}"] and (run / "ckpt" / "best" / "mine").is_dir()
    assert f"at step {best}, {run}/ckpt/step-{best:08d}\n" in done.stdout


def test_another_held_out_set_or_number_of_batches_is_judged_anew(overfits, tmp_path):
    config, run = overfits
    always = ["eval.patience=0"]
    assert train(config, *always, "eval.batches=1", failpoint="trainer.raise_sigterm:51").returncode == 75
    of_one_batch = evaluations(run)
    assert train(config, *always, failpoint="trainer.raise_sigterm:54").returncode == 75
    judged = evaluations(run)
    assert list(judged) == list(range(2, 53, 2)) and judged[52] > min(of_one_batch.values())
    assert checkpoints(run)[1] == "step-00000052"
    text = tmp_path / "other.txt"
    text.write_text("NOTHING LIKE IT?\n" * 40)
    other = [*always, f"data.val_text={text}"]
    for where in (55, 57):  # the second goes on from a checkpoint that knows the set
        done = train(config, *other, failpoint=f"trainer.raise_sigterm:{where}")
        assert done.returncode == 75 and ("the held-out set is another one" in done.stderr) == (where == 55), done.stderr
    judged_anew = {step: loss for step, loss in evaluations(run).items() if step > 52}
    assert list(judged_anew) == [54, 56] and min(judged_anew.values()) > judged[52]
    assert checkpoints(run)[1] == f"step-{lowest(judged_anew):08d}"


def test_fresh_takes_the_link_along(overfits):
    config, run = overfits
    short = ["train.max_steps=4"]
    assert train(config, *short).returncode == 0
    (best,) = [os.readlink(run / "ckpt" / "best")]
    assert train(config, *short, "--fresh").returncode == 0
    old = run.parent / "demo.old-1" / "ckpt" / "best"
    assert os.readlink(old) == best and (old / "MANIFEST.json").is_file()
    assert checkpoints(run)[1] == best


def test_without_keep_best_the_end_names_what_is_there(overfits):
    config, run = overfits
    done = train(config, "ckpt.keep_best=false")
    assert done.returncode == 0 and not (run / "ckpt" / "best").is_symlink()
    judged = evaluations(run)
    best = lowest(judged)
    kept = (run / "ckpt" / f"step-{best:08d}").is_dir()
    where = f"{run}/ckpt/step-{best:08d}" if kept else "whose checkpoint was not kept (ckpt.keep_best)"
    assert f"lowest held-out loss: {judged[best]:.4f} at step {best}, {where}\n" in done.stdout


def test_several_processes_end_together(overfits):
    config, run = overfits
    done = train(config, TWO_MICRO_BATCHES, "run.name=alone")
    assert done.returncode == 0, done.stderr
    alone = decisions(run.parent / "alone")
    last = max(alone[0])
    stopped = together(config, failpoint=f"trainer.raise_sigterm:{last - 1}", failing=1)
    assert [status for _, _, status in stopped] == [75, 75], stopped
    for _ in range(2):  # the second finds it finished
        ended = together(config)
        assert [status for _, _, status in ended] == [0, 0], ended
    names, named = checkpoints(run)
    assert (names, named) == (alone[1], alone[2])
    assert losses(run) == alone[3] and "this run is finished" in ended[0][0]


def test_nothing_held_out_is_an_error_of_the_settings(setup, corpus, tmp_path):  # noqa: F811
    config, _ = setup
    tokens = tmp_path / "tokens"
    subprocess.run([PROGRAM.parent / "xlstm-data", "prepare", corpus / "text.txt", "--output", tokens], check=True,
                   capture_output=True, env={**os.environ, "XLSTM_PYTHON": sys.executable})
    prepared = ["data.text=", f"data.train=[{{path: {tokens}}}]"]
    for setting in ("ckpt.keep_best=true", "eval.patience=2"):
        message = one_line_error(train(config, *prepared, setting), 2)
        assert f"{setting.split('=')[0]}: goes by the held-out loss, but nothing is held out" in message
