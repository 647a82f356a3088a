"""What `xlstm-train --describe` tells of settings: parameters, operations, memory, tokens and steps; nothing is trained."""

import concurrent.futures
import json
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

from .execution import SweepError

DEPENDS_ON = ("model", "data", "train", "optim")  # what is told, and whether the trainer takes the settings
NOT_ON = {"data": ("shuffle_seed",), "optim": ("learning_rate", "min_lr")}  # but not on these
FILES_WORTH_A_PROCESS = 4


def describe(program, settings):
    """What is told of each of {name: settings}, in their order, by a process for every core. A SweepError where the trainer
    does not take them."""
    names = list(settings)
    count = max(1, min(len(os.sched_getaffinity(0)), len(names) // FILES_WORTH_A_PROCESS))
    parts = [{name: settings[name] for name in names[i::count]} for i in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        told = list(pool.map(lambda part: _describe(program, part), parts))
    found = {name: numbers for part, lines in zip(parts, told) for name, numbers in zip(part, lines)}
    return [found[name] for name in names]


def _describe(program, settings):
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.yaml" for name in settings]
        for file, own in zip(files, settings.values()):
            file.write_text(yaml.safe_dump(own), encoding="utf-8")
        done = subprocess.run([str(program), *map(str, files), "--describe"], capture_output=True, text=True)
    if done.returncode != 0:
        what = done.stderr.strip().replace(f"{folder}/", "") or f"status {done.returncode}"
        raise SweepError(f"{program} --describe: {what}")
    try:
        found = [json.loads(line) for line in done.stdout.splitlines()]
    except ValueError:
        found = []
    if len(found) != len(settings):
        raise SweepError(f"{program} --describe: expected {len(settings)} lines of JSON, got {done.stdout[:200]!r}; is it of "
                         "another version?")
    return found


def _what_counts(settings):
    parts = {part: dict(settings[part]) for part in DEPENDS_ON if part in settings}
    for part, keys in NOT_ON.items():
        for key in keys:
            parts.get(part, {}).pop(key, None)
    return json.dumps(parts, sort_keys=True)


def described(experiment, jobs, programs, gpu=False):
    """{pair: what is told of it} for {(case, model): a job}; those that differ in nothing that counts are asked once.
    gpu: the memory is that of a run on a GPU, whether there is one here or not."""
    program = programs.path("xlstm-train")
    if not os.access(program, os.X_OK):
        raise SweepError(f"{program} is not there; build it, or name its folder with --bin")
    texts, different = {}, {}
    for (case, model), job in jobs.items():
        settings = experiment.settings(job)
        if gpu:
            settings = {**settings, "run": {**settings["run"], "device": "cuda"}}
        texts[case, model] = _what_counts(settings)
        different.setdefault(texts[case, model], (f"{case}.{model}", settings))
    numbers = dict(zip(different, describe(program, dict(different.values())))) if different else {}
    return {pair: numbers[text] for pair, text in texts.items()}
