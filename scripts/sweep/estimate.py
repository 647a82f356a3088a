"""What a full run costs: floating point operations of every job over what a device achieves.

The operations are the model's own (train/flops.h), three times the forward pass, counted by `xlstm-train --describe`; what
the device achieves is its rate times a utilisation (MFU). The defaults are those of one measured training step: 125 M
parameters, 4 x 2048 tokens, bfloat16, on an H200 (scripts/bench/results/gpu_2026-11-26.json): 127,951 tokens/s are 15.4 % of
what its matrix product gives, 764 TFLOP/s. Held-out evaluations, measures after training and saving are not counted. Models of
a few million parameters and those with sLSTM layers, which go through time step by step, reach less than that step did: give
them their own utilisation or a least time per step, or read their hours as a lower bound.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

from .execution import SweepError

PEAK_TFLOPS = 764.0
MFU_PERCENT = 15.4
FROM_MODEL_AND_DATA = ("model", "data", "train")  # what --describe's numbers depend on


@dataclasses.dataclass
class Cost:
    """Of all runs of a model in a case."""

    case: str
    model: str
    runs: int
    numbers: dict  # of xlstm-train --describe

    @property
    def flops(self):
        return self.runs * self.numbers["training_flops"]


def parse_mfu(text):
    """{model: percent} of "15", "15,xlstm_1_1=3"; None is every other model."""
    found = {None: MFU_PERCENT}
    for part in text.split(",") if text else []:
        model, _, value = part.rpartition("=")
        try:
            percent = float(value)
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:
            raise SweepError(f"--mfu: got {part}, expected a percentage, or MODEL=percentage")
        found[model or None] = percent
    return found


def describe(program, settings):
    """What --describe tells of each of {name: settings}, in their order. A SweepError where it does not take them."""
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


def costs(experiment, programs, models=None):
    """One Cost per case and model; models that differ in nothing that counts are described once, under CASE.MODEL."""
    jobs = {}
    for job in experiment.jobs(models):
        jobs.setdefault((job.case, job.model), []).append(job)
    texts, different = {}, {}
    for (case, model), group in jobs.items():
        own = experiment.settings(group[0])
        counts = {part: own[part] for part in FROM_MODEL_AND_DATA if part in own}
        counts["data"] = {key: value for key, value in own.get("data", {}).items() if key != "shuffle_seed"}
        texts[case, model] = yaml.safe_dump(counts)
        different.setdefault(texts[case, model], (f"{case}.{model}", own))
    program = programs.path("xlstm-train")
    if not os.access(program, os.X_OK):
        raise SweepError(f"{program} is not there; build it, or name its folder with --bin")
    numbers = dict(zip(different, describe(program, dict(different.values())))) if different else {}
    return [Cost(*key, len(group), numbers[texts[key]]) for key, group in jobs.items()]


@dataclasses.dataclass
class Device:
    peak_tflops: float = PEAK_TFLOPS
    mfu: dict = dataclasses.field(default_factory=lambda: {None: MFU_PERCENT})  # model -> percent, None: all others
    step_ms: float = 0.0  # no step takes less

    def hours(self, cost):
        rate = self.peak_tflops * 1e12 * self.mfu.get(cost.model, self.mfu[None]) / 100
        return max(cost.flops / rate, cost.runs * cost.numbers["steps"] * self.step_ms / 1e3) / 3600

    def __str__(self):
        own = "".join(f", {model} {percent:g} %" for model, percent in self.mfu.items() if model)
        least = f", at least {self.step_ms:g} ms a step" if self.step_ms else ""
        return (f"One GPU of {self.peak_tflops:g} TFLOP/s at {self.mfu[None]:g} % utilisation{own}{least} (--peak-tflops, "
                "--mfu, --step-ms); evaluations and saving left out.\nSmall models and sLSTM layers stay below that: theirs "
                "are lower bounds.")


def hours_text(hours):
    if hours >= 48:
        return f"{hours:,.0f} h = {hours / 24:,.1f} days"
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"


def estimate_text(experiment, found, device):
    """A row for every case and model, then by model and in all."""
    if not experiment.trains:
        return f"{experiment.name}: trains nothing\n"
    rows = [["case", "model", "parameters", "runs", "tokens each", "FLOP each", "GPU time"]]
    by_model = {}
    for cost in found:
        hours = device.hours(cost)
        by_model.setdefault(cost.model, []).append(hours)
        rows.append([cost.case, cost.model, f"{cost.numbers['parameters'] / 1e6:,.2f} M", str(cost.runs),
                     f"{cost.numbers['tokens'] / 1e6:,.0f} M", f"{cost.numbers['training_flops']:.3g}", hours_text(hours)])
    pairs = [(case, model) for case in experiment.cases for model in experiment.models_of(case)]
    left_out = sum(bool(experiment.needs_of(*pair)) for pair in pairs)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{experiment.name}: {sum(cost.runs for cost in found)} runs"]
    for row in rows:
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  " + "  ".join(cells))
    if len(experiment.cases) > 1:
        lines += [f"  {model}: {hours_text(sum(hours))}" for model, hours in by_model.items()]
    lines.append(f"  in all: {hours_text(sum(map(sum, by_model.values())))}")
    if left_out:
        lines.append(f"  not counted: {left_out} rows that cannot be run (their `needs`)")
    return "\n".join(lines) + "\n"

