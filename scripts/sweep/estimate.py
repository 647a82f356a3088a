"""What a full run costs: floating point operations of every job over what a device achieves.

The operations are the model's own (train/flops.h), three times the forward pass, counted by `xlstm-train --describe`; what
the device achieves is its rate times a utilisation (MFU). The defaults are those of one measured training step: xLSTM[1:0] with
125 M parameters, 4 x 2048 tokens, bfloat16, on an H200 (scripts/bench/results/gpu_model_h200.json): 179,708 tokens/s are 20.8 %
of what its matrix product gives, 794 TFLOP/s. The same run has 25.9 % of [1:0] 350M, 15.2 and 16.8 % of [7:1] 125M and 350M; no
other kind of model was measured, and what is printed names those that are not [1:0]. Held-out evaluations, measures after training
and saving are not counted. Models of a few million parameters and those with sLSTM layers, which go through time step by step,
reach less than that step did: give them their own utilisation or a least time per step, or read their hours as a lower bound.
"""

import dataclasses
import json

from .describe import described
from .execution import SweepError

PEAK_TFLOPS = 794.0
MFU_PERCENT = 20.8


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


def costs(experiment, programs, models=None, elsewhere=False):
    """One Cost per case and model. elsewhere: also of those whose files, or a GPU, are not here."""
    jobs = {}
    for job in experiment.jobs(models, elsewhere):
        jobs.setdefault((job.case, job.model), []).append(job)
    numbers = described(experiment, {pair: group[0] for pair, group in jobs.items()}, programs)
    return [Cost(*pair, len(group), numbers[pair]) for pair, group in jobs.items()]


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
                f"--mfu, --step-ms); evaluations and saving left out.\n{MFU_PERCENT:g} % were measured of xLSTM[1:0] with 125 M "
                "parameters, 15.2 % of [7:1]; no other kind's utilisation is known. Small\nmodels and sLSTM layers stay below "
                "the former: theirs are lower bounds.")


def hours_text(hours):
    if hours >= 48:
        return f"{hours:,.0f} h = {hours / 24:,.1f} days"
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"


def aligned(rows):
    """Lines of a table: two columns of names, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                             for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]


def not_measured(experiment, found, device):
    """Labels of the models whose utilisation is neither given nor the default's, that of mLSTM blocks alone."""
    def measured(cost):
        kind, slstm = (experiment.setting(f"model.{key}", cost.case, cost.model) for key in ("kind", "slstm_at"))
        return kind in (None, "xlstm") and not slstm

    models = dict.fromkeys(cost.model for cost in found if cost.model not in device.mfu and not measured(cost))
    return [experiment.label(model) for model in models]


class TrainedBefore:
    """Counts the runs of an experiment that one before it has just so: every experiment trains its own."""

    def __init__(self):
        self.experiments = {}  # settings of a run -> the first experiment that has it

    def add(self, experiment, models=None):
        """{experiment: how many runs of this one it has, too}."""
        counts = {}
        for job in experiment.jobs(models, elsewhere=True) if experiment.trains else ():
            settings = json.dumps(experiment.settings(job), sort_keys=True)
            first = self.experiments.setdefault(settings, experiment.name)
            if first != experiment.name:
                counts[first] = counts.get(first, 0) + 1
        return counts


def estimate_text(experiment, found, device, before=None):
    """A row for every case and model, then by model and in all. before: of TrainedBefore."""
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
    left_out = sum(bool(experiment.needs_of(*pair, elsewhere=True)) for pair in pairs)
    lines = [f"{experiment.name}: {sum(cost.runs for cost in found)} runs", *aligned(rows)]
    if len(experiment.cases) > 1:
        lines += [f"  {model}: {hours_text(sum(hours))}" for model, hours in by_model.items()]
    lines.append(f"  in all: {hours_text(sum(map(sum, by_model.values())))}")
    if unknown := not_measured(experiment, found, device):
        lines.append(f"  other models than the one whose utilisation is taken: {', '.join(unknown)}")
    for other, count in (before or {}).items():
        lines.append(f"  counted there, too: {count} of these runs are runs of {other}, but each experiment trains its own")
    if left_out:
        lines.append(f"  not counted: {left_out} rows that cannot be run (their `needs`)")
    return "\n".join(lines) + "\n"

