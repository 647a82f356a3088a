"""A sweep of reproduce.py that takes milliseconds: a description and a stand-in for xlstm-train."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "reproduce.py"

# Ten steps; goes on from the steps its metrics tell. The accuracy is a function of model and learning rate. --describe: twice
# as many parameters as steps, skill * 1e18 operations; memory only where the skill is 1.
TRAINER = """#!{python}
import fcntl, json, pathlib, sys, time, yaml
def memory(skill):
    known = skill == 1
    return {{"memory_bytes": 5 * 2**30 if known else None, "activation_bytes": 2 * 2**30 if known else None}}
if "--describe" in sys.argv:
    for path in sys.argv[1:-1]:
        config = yaml.safe_load(open(path))
        if config["model"]["kind"] == "unheard-of":
            sys.exit(f"xlstm-train: error: {{path}}:3: model.kind: is unheard-of")
        steps = config["train"]["max_steps"]
        print(json.dumps({{"parameters": 2 * steps, "training_flops": 1e18 * config["model"]["skill"], "tokens": 64 * steps,
                          "steps": steps, **memory(config["model"]["skill"])}}))
    sys.exit()
config = yaml.safe_load(open(sys.argv[1]))
run = pathlib.Path(config["run"]["out_dir"]) / config["run"]["name"]
run.mkdir(parents=True, exist_ok=True)
lock = open(run / "lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("xlstm-train: error: another process trains there")
with open(run / "starts", "a") as file:
    file.write("x")
if config["model"]["kind"] == "broken":
    sys.exit("xlstm-train: error: the disk is full")
(run / "run.json").write_text(json.dumps({{"parameters": 1234}}))
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
for step in range(done + 1, 11):
    time.sleep({delay})
    accuracy = config["model"]["skill"] * step / 10 - config["optim"]["learning_rate"]
    with open(metrics, "a") as file:
        file.write(json.dumps({{"step": step, "perf/step_ms": 1000, "val/accuracy": accuracy}}) + "\\n")
if config["model"]["kind"] == "diverging":
    sys.exit(5)
"""
EXPERIMENT = """
title: Toy
source: nowhere
base: {train: {max_steps: 10}}
models:
  good: {label: Good, config: {model: {kind: a, skill: 1.0}}}
  bad: {config: {model: {kind: a, skill: 0.5}}}
  later: {needs: a larger machine}
learning_rates: [0.1, 0.2]
seeds: [0, 1]
reach: {steps_to_half: {metric: accuracy, at_least: 0.45}}
measure: accuracy
columns: [steps_to_half]
figures: {}
paper: {all: {good: 0.8}}
claims:
  - {text: good is better, expect: good.accuracy > bad.accuracy + 0.3, asserted: true}
"""


@pytest.fixture
def toy(tmp_path):
    folder = tmp_path / "experiments" / "toy"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    set_trainer(tmp_path, 0)
    return tmp_path


def set_trainer(folder, delay):
    program = folder / "bin" / "xlstm-train"
    program.parent.mkdir(exist_ok=True)
    program.write_text(TRAINER.format(python=sys.executable, delay=delay))
    program.chmod(0o755)


def edit(folder, old, new):
    path = folder / "experiments" / "toy" / "experiment.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def command(folder, *arguments, out="out"):
    return [sys.executable, str(SCRIPT), *arguments, "--bin", str(folder / "bin"), "--out", str(folder / out),
            "--experiments", str(folder / "experiments")]


def reproduce(folder, *arguments, out="out"):
    return subprocess.run(command(folder, *arguments, out=out), capture_output=True, text=True, timeout=120)
