"""reproduce.py instead of a sweep: what full runs cost, single runs, and the scripts that start them elsewhere."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from toy_sweep import ROOT, command, edit, reproduce, set_trainer, toy  # noqa: F401

sys.path.insert(0, str(ROOT / "scripts"))

from sweep import description, sweeps  # noqa: E402
from sweep.estimate import Device, TrainedBefore, hours_text, parse_mfu  # noqa: E402
from sweep.execution import SweepError, trainer_status  # noqa: E402

RUNS = [f"all/{model}/lr{rate}_seed{seed}" for model in ("good", "bad") for rate in (0.1, 0.2) for seed in (0, 1)]


def lines_of(text):
    return [line.split() for line in text.splitlines()]


def test_estimate(toy):
    done = reproduce(toy, "toy", "--estimate", "--peak-tflops", "1000", "--mfu", "25,bad=50")
    assert done.returncode == 0, done.stderr
    assert "1000 TFLOP/s at 25 % utilisation, bad 50 %" in done.stdout
    # Four runs of 1e18 operations at 1e15 / 4 a second are 16,000 s, and four of half as many twice as fast 4,000 s.
    assert "all good 0.00 M 4 0 M 1e+18 4.44 h".split() in lines_of(done.stdout)
    assert "all bad 0.00 M 4 0 M 5e+17 1.11 h".split() in lines_of(done.stdout)
    assert "in all: 5.56 h" in done.stdout and "not counted: 1 rows" in done.stdout
    assert "in all: 12 min" in reproduce(toy, "toy", "--estimate", "--peak-tflops", "1e9", "--step-ms", "9000").stdout
    assert not (toy / "out").exists()


def test_estimate_of_a_choice_and_of_all(toy):
    done = reproduce(toy, "toy", "--estimate", "--only", "good", "--seeds", "1", "--mfu", "100", "--peak-tflops", "1000")
    assert "toy: 2 runs" in done.stdout and "in all: 33.3 min" in done.stdout
    (toy / "experiments" / "other").mkdir()
    (toy / "experiments" / "other" / "experiment.yaml").write_text(
        (toy / "experiments" / "toy" / "experiment.yaml").read_text().replace("title: Toy", "title: Other"))
    done = reproduce(toy, "--all", "--estimate")
    assert done.returncode == 0 and "toy: 8 runs" in done.stdout and "other: 8 runs" in done.stdout


def test_the_estimate_says_what_was_never_measured_and_what_is_counted_twice(toy):
    edit(toy, "model: {kind: a, skill: 1.0}", "model: {kind: xlstm, skill: 1.0}")
    (toy / "experiments" / "other").mkdir()
    (toy / "experiments" / "other" / "experiment.yaml").write_text(
        (toy / "experiments" / "toy" / "experiment.yaml").read_text().replace("skill: 0.5", "skill: 0.4"))
    other, toys = reproduce(toy, "--all", "--estimate").stdout.split("\ntoy: ")
    assert "20.8 % were measured of xLSTM[1:0]" in other and "whose utilisation is taken: bad\n" in toys
    assert "4 of these runs are runs of other, but each experiment trains its own" in toys and "of these runs" not in other
    assert "whose utilisation" not in reproduce(toy, "toy", "--estimate", "--mfu", "20,bad=3").stdout
    edit(toy, "kind: xlstm, skill: 1.0", "kind: xlstm, slstm_at: [0], skill: 1.0")
    assert "whose utilisation is taken: Good, bad\n" in reproduce(toy, "toy", "--estimate").stdout


def test_experiments_that_train_the_same_models():
    before = TrainedBefore()
    names = ("length_extrapolation", "mqar2", "mqar3", "scaling300b")
    counts = {name: before.add(description.load(ROOT / "scripts" / "reproduce", name)) for name in names}
    assert counts == {"length_extrapolation": {}, "mqar2": {}, "mqar3": {"mqar2": 7 * 3 * 3 * 4},
                      "scaling300b": {"length_extrapolation": 5}}


def test_dry_run(toy):
    done = reproduce(toy, "toy", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "all good 0.00 M 0.00 M 10 3 2 5".split() in lines_of(done.stdout)
    assert "all bad 0.00 M 0.00 M 10 2.98e-07 - -".split() in lines_of(done.stdout)  # 320 bytes; activations are not known
    assert "all later - - - - - - (1)".split() in lines_of(done.stdout)  # a description without a model
    assert "(1) not run here: needs a larger machine" in done.stdout and not (toy / "out").exists()
    edit(toy, "title: Toy", "title: Toy\nneeds: a text\nfiles: nowhere/text.bin")
    edit(toy, "later: {", "later: {config: {model: {kind: a, skill: 1.0}}, ")
    done = reproduce(toy, "--all", "--dry-run")
    assert done.returncode == 0 and "toy: 3 rows" in done.stdout
    assert "all good 0.00 M 0.00 M 10 3 2 5 (1)".split() in lines_of(done.stdout)
    assert "all later 0.00 M 0.00 M 10 3 2 5 (2)".split() in lines_of(done.stdout)
    assert "(1) not run here: needs a text" in done.stdout


def test_without_its_files_an_experiment_is_not_run_but_counted(toy):
    edit(toy, "title: Toy", "title: Toy\nneeds: a text\nfiles: nowhere/text.bin")
    done = reproduce(toy, "toy")
    assert done.returncode == 0 and done.stdout.count("not run: needs a text") == 2 and "failed" not in done.stderr
    assert not (toy / "out" / "toy" / "all").exists()
    assert "toy: 8 runs" in reproduce(toy, "toy", "--estimate").stdout
    assert len(reproduce(toy, "toy", "--print-jobs").stdout.splitlines()) == 8 and launch_files(toy).exists()
    done = reproduce(toy, "toy", "--job", RUNS[0])
    assert done.returncode == 2 and f"toy/{RUNS[0]} needs a text" in done.stderr


def test_utilisation_and_times():
    assert parse_mfu("")[None] == 20.8 and parse_mfu("20,a=3") == {None: 20, "a": 3}
    for text in ("x", "0", "a=101", "a="):
        with pytest.raises(SweepError, match="--mfu"):
            parse_mfu(text)
    assert [hours_text(h) for h in (100, 5, 0.5, 0.001)] == ["100 h = 4.2 days", "5 h", "30 min", "3.6 s"]
    assert "794 TFLOP/s at 20.8 %" in str(Device())


@pytest.mark.skipif(not (ROOT / "build/bin/xlstm-train").exists(), reason="build/bin/xlstm-train is not built")
def test_estimate_of_a_real_experiment():
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "reproduce.py"), "ablation_block", "--estimate", "--only",
                           "xlstm_1_0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # 15.7 B tokens of a model with 409 M parameters are about 4e19 operations: 70 hours of 165 TFLOP/s.
    row = next(line for line in lines_of(done.stdout) if line[:2] == ["all", "xlstm_1_0"])
    assert row[2] == "409.29" and row[5] == "15,729" and 55 < float(row[8]) < 85


def test_single_runs_and_their_table(toy):
    printed = reproduce(toy, "toy", "--print-jobs").stdout.splitlines()
    assert [shlex.split(line)[-2:] for line in printed] == [["--job", name] for name in RUNS]
    assert subprocess.run(shlex.split(printed[0]), capture_output=True).returncode == 0
    assert reproduce(toy, "toy", "--job", RUNS[1]).returncode == 0
    assert not (toy / "out" / "toy" / "table.md").exists()
    done = reproduce(toy, "toy", "--collect")
    assert done.returncode == 0 and "2 of 4 runs are unfinished" not in done.stdout
    assert "| Good | 1,234 | 0.1 | 0.8 | 0.9 (0.9 to 0.9) |" in done.stdout and "4 of 4 runs are unfinished" in done.stdout
    assert reproduce(toy, "toy", "--job", RUNS[1]).returncode == 0
    assert (toy / "out" / "toy" / RUNS[1] / "starts").read_text() == "x"
    assert "has no all/none" in reproduce(toy, "toy", "--job", "all/none").stderr


def test_what_a_machine_with_a_gpu_measured_is_collected_on_one_without(toy, monkeypatch):
    edit(toy, "title: Toy", "title: Toy\nneeds: a large machine\ngpu: true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name in RUNS[:2]:
        assert reproduce(toy, "toy", "--job", name).returncode == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = reproduce(toy, "toy", "--collect")
    assert done.returncode == 0 and "| Good | 1,234 | 0.1 | 0.8 | 0.9 (0.9 to 0.9) |" in done.stdout
    assert "2 of 4 runs are not finished" in done.stdout
    assert "| bad |  |  |  | not run: needs a large machine; no GPU is seen here |" in done.stdout


def test_single_runs_stand_side_by_side_but_not_twice(toy):
    folder = sweeps.SweepFolder(toy / "out" / "toy")
    folder.share()
    (folder.path / RUNS[0]).parent.mkdir(parents=True)
    held = sweeps.lock(folder.path / f"{RUNS[0]}.lock")
    same = reproduce(toy, "toy", "--job", RUNS[0])
    assert same.returncode == 2 and "at work on this run" in same.stderr
    whole = reproduce(toy, "toy", "--resume")
    assert whole.returncode == 2 and "at work there" in whole.stderr
    assert reproduce(toy, "toy", "--job", RUNS[1]).returncode == 0
    held.close()
    set_trainer(toy, 3)
    process = subprocess.Popen(command(toy, "toy", "--job", RUNS[0]), stderr=subprocess.DEVNULL)
    while not (folder.path / RUNS[0] / "starts").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


def launch_files(toy):
    done = reproduce(toy, "toy", "--launch", str(toy / "launch"))
    assert done.returncode == 0, done.stderr
    assert (toy / "launch" / "jobs.txt").read_text().splitlines() == RUNS
    return toy / "launch"


def test_the_script_for_one_machine(toy):
    edit(toy, "kind: a, skill: 0.5", "kind: broken, skill: 0.5")
    local = launch_files(toy) / "local.sh"
    done = subprocess.run([local], env={**os.environ, "GPUS": "0 1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the disk is full" in done.stderr
    assert "| Good | 1,234 | 0.1 |" in (toy / "out" / "toy" / "table.md").read_text()
    edit(toy, "kind: broken, skill: 0.5", "kind: a, skill: 0.5")
    done = subprocess.run([local], env={**os.environ, "GPUS": "3"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| bad | 1,234 | 0.1 |" in (toy / "out" / "toy" / "table.md").read_text()
    starts = [(toy / "out" / "toy" / name / "starts").read_text() for name in RUNS]
    assert starts[:4] == ["x"] * 4  # what was finished is not started again


def test_the_script_for_one_machine_stops_and_goes_on(toy):
    local = launch_files(toy) / "local.sh"
    set_trainer(toy, 3)  # stopped long before its end, however slow the machine
    process = subprocess.Popen([local], env={**os.environ, "GPUS": "0 1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = [toy / "out" / "toy" / name / "starts" for name in RUNS[:2]]
    while not all(path.exists() for path in started):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not list((toy / "out" / "toy").glob("all/*/*.result.json"))
    set_trainer(toy, 0)
    done = subprocess.run([local], env={**os.environ, "GPUS": "0 1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "| bad | 1,234 |" in done.stdout, done.stderr


def test_the_gpu_of_a_run_is_its_workers(toy):
    trainer = toy / "bin" / "xlstm-train"
    trainer.write_text(trainer.read_text().replace("import fcntl,", "import os, fcntl,").replace(
        'file.write("x")', 'file.write(os.environ["CUDA_VISIBLE_DEVICES"])'))
    subprocess.run([launch_files(toy) / "local.sh"], env={**os.environ, "GPUS": "5 7"}, capture_output=True, timeout=120)
    gpus = [(toy / "out" / "toy" / name / "starts").read_text() for name in RUNS]
    assert set(gpus) == {"5", "7"}


SLURM_STANDINS = {"srun": 'exec "$@"', "scontrol": 'echo "$@" >>"$CALLS"'}


def test_the_slurm_array(toy):
    folder = launch_files(toy)
    text = (folder / "array.sbatch").read_text()
    assert "#SBATCH --array=1-8\n" in text and "#SBATCH --gres=gpu:1\n" in text and "OFFSET=" not in text.split("#SBATCH")[0]
    programs = toy / "slurm"
    programs.mkdir()
    for name, body in SLURM_STANDINS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(toy / "calls"),
                   "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    task = ["bash", folder / "array.sbatch"]
    assert subprocess.run(task, env=environment, capture_output=True).returncode == 0
    assert [p.name for p in (toy / "out" / "toy").glob("all/*/*.result.json")] == ["lr0.2_seed0.result.json"]
    assert not (toy / "calls").exists()
    set_trainer(toy, 3)
    process = subprocess.Popen(["bash", folder / "array.sbatch"], env={**environment, "OFFSET": "1"}, stderr=subprocess.DEVNULL)
    started = toy / "out" / "toy" / RUNS[3] / "starts"
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)  # as SLURM signals the step, not the script
    assert process.wait() == 75
    assert (toy / "calls").read_text() == "requeue 77_3\n"
    beyond = subprocess.run(task, env={**environment, "OFFSET": "8"}, capture_output=True, text=True)
    assert beyond.returncode == 2 and "no such line" in beyond.stderr


def test_several_gpus_for_a_run(toy):
    assert reproduce(toy, "toy", "--launch", str(toy / "launch"), "--processes", "2").returncode == 0
    text = (toy / "launch" / "array.sbatch").read_text()
    assert "--gres=gpu:2\n" in text and "--cpus-per-task=16\n" in text and "--processes 2 " in text
    lines = (toy / "launch" / "local.sh").read_text().splitlines()
    first, end = (next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("read -ra", "mapfile"))
    dealt = "\n".join(lines[first:end]) + '\nprintf "%s\\n" "${gpus[@]}"'
    done = subprocess.run(["bash", "-c", dealt], env={**os.environ, "GPUS": "0 1 5 6 7"}, capture_output=True, text=True)
    assert done.stdout.split() == ["0,1", "5,6"]
    done = subprocess.run(["bash", "-c", dealt], env={**os.environ, "GPUS": "0"}, capture_output=True, text=True)
    assert done.returncode == 2 and "fewer than 2" in done.stderr


def test_what_the_trainer_ended_with_under_torchrun():
    told = "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : {} (pid: 12)\n"
    assert [trainer_status(1, told.format(code)) for code in (5, 75, -9)] == [5, 75, -9]
    assert trainer_status(1, "[1]:\n  exitcode  : 6 (pid: 3)\n" + told.format(4)) == 4
    assert trainer_status(0, told.format(5)) == 0 and trainer_status(1, "no torchrun") == 1


def test_arrays_beyond_the_usual_limit_come_in_parts(toy):
    edit(toy, "seeds: [0, 1]", f"seeds: {list(range(600))}")
    reproduce(toy, "toy", "--launch", str(toy / "launch"))
    text = (toy / "launch" / "array.sbatch").read_text()
    assert "#SBATCH --array=1-1000\n" in text
    assert [line.split()[1:4] for line in text.splitlines() if line.startswith("#   OFFSET")] == [
        [f"OFFSET={1000 * i}", "sbatch", f"--array=1-{n}"] for i, n in ((1, 1000), (2, 400))]


def test_settings_that_do_not_change_the_cost_are_described_once(toy):
    trainer = toy / "bin" / "xlstm-train"
    told = f'        open("{toy}/calls", "a").write("x")\n        config = yaml'
    trainer.write_text(trainer.read_text().replace("        config = yaml", told))
    experiment = toy / "experiments" / "toy" / "experiment.yaml"
    content = yaml.safe_load(experiment.read_text())
    content["models"]["again"] = dict(content["models"]["good"], label="Again")
    experiment.write_text(yaml.safe_dump(content))
    assert reproduce(toy, "toy", "--estimate").returncode == 0
    assert (toy / "calls").read_text() == "xx"  # good and bad
