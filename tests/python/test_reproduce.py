"""scripts/reproduce.py: sweeps with a stand-in for the trainer that takes milliseconds, and one real run."""

import csv
import fcntl
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from toy_sweep import EXPERIMENT, ROOT, SCRIPT, command, edit, reproduce, set_trainer, toy  # noqa: F401

sys.path.insert(0, str(ROOT / "scripts"))

from sweep import description  # noqa: E402


def test_table_and_csv(toy):
    done = reproduce(toy, "toy", "--check", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    table = (toy / "out" / "toy" / "table.md").read_text()
    assert "| Good | 1,234 | 0.1 | 0.8 | 0.9 (0.9 to 0.9) | +0.1 | 6 | 10 | 40s |" in table
    assert "| bad | 1,234 | 0.1 |  | 0.4 (0.4 to 0.4) |  | never | 10 | 40s |" in table
    assert "not run: needs a larger machine" in table
    rows = list(csv.DictReader(open(toy / "out" / "toy" / "results.csv")))
    assert len(rows) == 8 and {row["status"] for row in rows} == {"done"}
    assert [float(row["accuracy"]) for row in rows[:4]] == pytest.approx([0.9, 0.9, 0.8, 0.8])
    assert "8/8" in done.stderr and "eta" in done.stderr


def test_check_tells_a_claim_that_does_not_hold(toy):
    edit(toy, "+ 0.3", "+ 0.6")
    assert reproduce(toy, "toy").returncode == 0
    done = reproduce(toy, "toy", "--check", "--resume")
    assert done.returncode == 1 and "toy does not hold: good is better" in done.stderr
    edit(toy, "asserted: true", "asserted: false")
    assert reproduce(toy, "toy", "--check", "--resume").returncode == 0


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_killed_sweep_goes_on_to_the_same_table(toy, how, status):
    assert reproduce(toy, "toy", out="whole").returncode == 0
    set_trainer(toy, 0.03)
    process = subprocess.Popen(command(toy, "toy"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = toy / "out" / "toy" / "all" / "good" / "lr0.1_seed0.result.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(how)
    assert process.wait() == status
    set_trainer(toy, 0)
    assert reproduce(toy, "toy").returncode == 2  # neither --resume nor --fresh
    assert reproduce(toy, "toy", "--resume").returncode == 0
    for name in ("table.md", "results.csv"):
        assert (toy / "out" / "toy" / name).read_text() == (toy / "whole" / "toy" / name).read_text()
    assert (first.parent / "lr0.1_seed0" / "starts").read_text() == "x"  # a finished run is not started again


def steps_so_far(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/*/*/metrics.jsonl"))


def kill_at_random_moments(start, sweep, moments, rest):
    """SIGKILL to the process group of the command `start`, each time a little after another random number of steps below `rest`,
    one from each of as many equal parts, and after one step at least that this start made. XLSTM_FAULT_SEED replays the
    moments of an earlier test."""
    seed = int(os.environ.get("XLSTM_FAULT_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"XLSTM_FAULT_SEED={seed}")
    chance = random.Random(seed)
    for part in range(moments):
        threshold = max(round(rest * (part + chance.random()) / moments), steps_so_far(sweep) + 1)
        process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while steps_so_far(sweep) < threshold and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        assert process.poll() is None, "the sweep ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def without_times(path):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(open(path))]


def table_without_cost(path):
    """Of the models' table, which has that column last."""
    lines = path.read_text().splitlines()
    assert any(line.endswith("| steps | cost |") for line in lines)
    return [line.rsplit("|", 2)[0] if line.startswith("|") else line for line in lines]


def test_a_sweep_killed_at_ten_random_moments_has_the_same_results(toy):
    assert reproduce(toy, "toy", out="whole").returncode == 0
    set_trainer(toy, 0.03)
    kill_at_random_moments(command(toy, "toy", "--resume", "--jobs", "2"), toy / "out" / "toy", 10, 60)
    assert reproduce(toy, "toy", "--resume", "--jobs", "2").returncode == 0
    whole, killed = (without_times(toy / out / "toy" / "results.csv") for out in ("whole", "out"))
    assert killed == whole and len(killed) == 8
    assert (toy / "out" / "toy" / "table.md").read_text() == (toy / "whole" / "toy" / "table.md").read_text()
    starts = [len((run / "starts").read_text()) for run in (toy / "out" / "toy" / "all").glob("*/lr*") if run.is_dir()]
    assert sum(starts) > 10 and max(starts) > 1  # each of the ten and the last made a step; a run was started again


def test_a_killed_trainer_that_is_not_quite_dead_is_waited_for(toy):
    folder = toy / "out" / "toy" / "all" / "good" / "lr0.1_seed0"
    folder.mkdir(parents=True)
    dying = open(folder / "lock", "w")
    fcntl.flock(dying, fcntl.LOCK_EX)
    process = subprocess.Popen(command(toy, "toy", "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (toy / "out" / "toy" / "lock").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    assert not (folder / "starts").exists()
    dying.close()
    assert "at work there" not in process.communicate()[1] and process.returncode == 0


def test_only_and_seeds(toy):
    done = reproduce(toy, "toy", "--only", "good", "--seeds", "1", "--check")
    assert done.returncode == 0, done.stderr
    table = (toy / "out" / "toy" / "table.md").read_text()
    assert "left out by --only" in table and "not judged: no bad.accuracy" in table
    assert len((toy / "out" / "toy" / "results.csv").read_text().splitlines()) == 3


def test_failed_and_diverged_runs(toy):
    edit(toy, "bad: {config: {model: {kind: a", "bad: {config: {model: {kind: diverging")
    done = reproduce(toy, "toy", "--check")
    assert done.returncode == 1 and "diverged" in (toy / "out" / "toy" / "table.md").read_text()
    edit(toy, "kind: diverging", "kind: broken")
    done = reproduce(toy, "toy", "--fresh")
    assert done.returncode == 1 and "the disk is full" in done.stdout
    assert "reproduce: toy/all/bad/lr0.1_seed0 failed: xlstm-train: error: the disk is full" in done.stderr
    assert "reproduce: 4 runs failed; --resume tries them again" in done.stderr
    assert (toy / "out" / "toy.old-1").exists()


def test_the_experiments_are_listed_by_their_name_alone(toy):
    done = reproduce(toy)
    assert done.returncode == 0 and done.stdout.split() == ["toy", "Toy"]
    for arguments in (["--mini", "--check"], ["--collect"], ["--only", "good"]):
        done = reproduce(toy, *arguments)
        assert done.returncode == 2 and "name an experiment, or give --all; there are: toy" in done.stderr
    done = reproduce(toy, "toy", "--resume", "--fresh")
    assert done.returncode == 2 and "not allowed with argument --resume" in done.stderr


def test_errors_are_clear(toy):
    for arguments, message in ((["nothing"], "there is no experiment nothing; there are: toy"),
                               (["toy", "--only", "x"], "has no model x; it has good, bad, later")):
        done = reproduce(toy, *arguments)
        assert done.returncode == 2 and message in done.stderr
    edit(toy, "bad: {config: {model: {kind: a", "bad: {config: {model: {kind: unheard-of")
    done = reproduce(toy, "toy", "--fresh")  # said before the first run
    assert done.returncode == 2 and "xlstm-train: error: all.bad.yaml:3: model.kind: is unheard-of" in done.stderr
    assert not (toy / "out" / "toy" / "all").exists()
    (toy / "bin" / "xlstm-train").unlink()
    done = reproduce(toy, "toy")
    assert done.returncode == 2 and "xlstm-train is not there; build it" in done.stderr


@pytest.mark.skipif(not (ROOT / "build/bin/xlstm-train").exists(), reason="build/bin/xlstm-train is not built")
def test_full_size_settings_are_taken_and_a_real_run(tmp_path):
    full = description.load(ROOT / "scripts" / "reproduce", "formal_languages")
    jobs = {job.model: job for job in full.jobs()}
    for model in ("xlstm_1_1", "llama"):
        config = tmp_path / f"{model}.yaml"
        config.write_text(yaml.safe_dump(full.settings(jobs[model])))
        dry = subprocess.run([ROOT / "build/bin/xlstm-train", config, "--dry-run"], capture_output=True, text=True)
        assert dry.returncode == 0 and "100000 steps" in dry.stdout.replace(",", ""), dry.stderr
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    mini = description.load(ROOT / "scripts" / "reproduce", "formal_languages", mini=True)
    base = description.merge(mini.base, {"train": {"max_steps": 5, "global_batch_size": 4}, "optim": {"warmup_steps": 1},
                                         "data": {"task": {"eval_samples": 8}}})
    (folder / "experiment.yaml").write_text(yaml.safe_dump({
        "title": "Tiny", "source": "test", "base": base, "cases": mini.cases, "learning_rates": [1e-3],
        "models": {"lstm": mini.models["lstm"]}, "evaluations": {"short": {"seq_len": 20, "min_len": 10}},
        "measure": "short.scaled_accuracy"}))
    done = subprocess.run([sys.executable, SCRIPT, "tiny", "--experiments", folder.parent, "--out", tmp_path / "out"],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "XLSTM_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    assert "| LSTM | 17,120 |" in done.stdout


def second_experiment(folder):
    """Another toy, and a third without a miniature."""
    for name, title in (("other", "Other"), ("large", "Large")):
        (folder / "experiments" / name).mkdir()
        (folder / "experiments" / name / "experiment.yaml").write_text(
            EXPERIMENT.replace("title: Toy", f"title: {title}\nneeds: ten GPUs").replace("skill: 1.0", "skill: 0.9"))
    for name in ("toy", "other"):
        (folder / "experiments" / name / "mini.yaml").write_text("seeds: [0]\npaper: {}\n")


def test_all_experiments_and_their_page(toy):
    second_experiment(toy)
    done = reproduce(toy, "--all", "--mini", "--check", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    page = (toy / "out" / "report.html").read_text()
    for text in ("Toy: miniature", "Other: miniature", "Large", "it has no miniature; the full size needs ten GPUs",
                 "good is better"):
        assert text in page, text
    assert "8/8 toy-mini/all/" in done.stderr and "other-mini/all/good/lr0.1_seed0: accuracy 0.8" in done.stderr
    assert sorted(p.name for p in (toy / "out").iterdir()) == ["other-mini", "report.html", "toy-mini"]
    assert reproduce(toy, "--all", "--mini").returncode == 2  # neither --resume nor --fresh
    edit(toy, "+ 0.3", "+ 0.6")
    done = reproduce(toy, "--all", "--mini", "--check", "--resume")
    assert done.returncode == 1 and "toy-mini does not hold: good is better" in done.stderr
    starts = (toy / "out" / "other-mini" / "all" / "good" / "lr0.1_seed0" / "starts").read_text()
    assert starts == "x"


def test_what_a_running_sweep_has_measured(toy):
    second_experiment(toy)
    assert reproduce(toy, "toy", "--mini", "--only", "good").returncode == 0
    done = reproduce(toy, "toy", "--mini", "--collect")
    assert done.returncode == 0 and "| bad |  |  |  | not run: 2 of 2 runs are unfinished |" in done.stdout
    done = reproduce(toy, "--all", "--mini", "--collect", "--check")
    assert done.returncode == 1 and "toy-mini could not be judged: good is better" in done.stderr
    assert "Other: miniature" in (toy / "out" / "report.html").read_text()
    assert not (toy / "out" / "other-mini" / "all").exists()


@pytest.mark.skipif(not (ROOT / "build/bin/xlstm-train").exists(), reason="build/bin/xlstm-train is not built")
def test_a_real_sweep_killed_at_ten_random_moments_has_the_same_results(tmp_path):
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("""
title: Tiny
source: test
base:
  model: {vocab_size: 3, embedding_dim: 8, num_blocks: 1, num_heads: 1}
  data: {seq_len: 12, task: {name: parity, eval_min_len: 8, eval_len: 16, eval_samples: 32}}
  train: {global_batch_size: 4, max_steps: 120}
  optim: {warmup_steps: 2}
  ckpt: {every: 30, keep_last: 1}
  eval: {every: 30}
  log: {every: 1, console: plain, tensorboard: false, plot: false}
models: {lstm: {config: {model: {kind: lstm}}}, xlstm: {}}
learning_rates: [1.0e-2]
seeds: [0, 1, 2]
reach: {steps_to_0: {metric: accuracy, at_least: 0.0}}
evaluations: {longer: {seq_len: 20, min_len: 20}}
measure: loss
better: lower
columns: [longer.loss, steps_to_0]
figures: {}
""")

    def sweep(out):
        return [sys.executable, str(SCRIPT), "tiny", "--experiments", str(folder.parent), "--out", str(tmp_path / out),
                "--resume", "--jobs", "2"]

    kill_at_random_moments(sweep("killed"), tmp_path / "killed" / "tiny", 10, 4 * 120)
    for out in ("killed", "whole"):
        done = subprocess.run(sweep(out), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    killed, whole = (without_times(tmp_path / out / "tiny" / "results.csv") for out in ("killed", "whole"))
    assert killed == whole and len(killed) == 6
    assert all(row["status"] == "done" and row["longer.loss"] for row in killed)
    killed, whole = (table_without_cost(tmp_path / out / "tiny" / "table.md") for out in ("killed", "whole"))
    assert killed == whole
    curves = [(tmp_path / out / "tiny" / "curves.csv").read_text() for out in ("killed", "whole")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 1 + 6 * 4


def test_what_is_of_no_paper_has_no_columns_for_it(toy):  # noqa: F811
    edit(toy, "source: nowhere\n", "")
    edit(toy, "paper: {all: {good: 0.8}}\n", "")
    done = reproduce(toy, "toy")
    assert done.returncode == 0, done.stderr
    table = (toy / "out" / "toy" / "table.md").read_text()
    assert "| model | parameters | learning rate | accuracy | steps_to_half | steps | cost |" in table
    assert "paper" not in table.split("claim")[0] and "nowhere" not in table
