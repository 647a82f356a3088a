"""Every row of an experiment without a run: what each model of each case has and takes, and what is missing to train it."""

import contextlib
import dataclasses

from .describe import described
from .description import Job
from .estimate import aligned
from .execution import SweepError

GIB = 2**30
BYTES_PER_PARAMETER = 4  # float32
BYTES_IN_TRAINING = 16  # with its gradient and two moments


@dataclasses.dataclass
class Described:
    """A case and model; None: not known, or there is none."""

    case: str
    model: str
    needs: str  # why it cannot be run here; "" if it can
    parameters: int | None = None
    tokens: int | None = None  # of one run
    steps: int | None = None
    weights: int | None = None  # bytes; where it trains, with gradients and the optimizer's moments
    activations: int | None = None  # bytes, of one micro batch


def _row(experiment, case, model, numbers):
    needs = experiment.needs_of(case, model)
    if numbers is None:
        return Described(case, model, needs)
    if not experiment.trains:
        return Described(case, model, needs, numbers["parameters"], weights=BYTES_PER_PARAMETER * numbers["parameters"])
    activations, memory = numbers.get("activation_bytes"), numbers.get("memory_bytes")
    known = None not in (activations, memory)
    weights = memory - activations if known else BYTES_IN_TRAINING * numbers["parameters"]
    return Described(case, model, needs, numbers["parameters"], numbers["tokens"], numbers["steps"], weights, activations)


def rows(experiment, programs, models=None):
    """One for every case and model, those too that lack files; of what cannot be run anywhere, what the trainer takes: what it
    refuses of one model it refuses of the others that lack the same in that case."""
    jobs = {(case, model): Job(case, model, float(experiment.rates(case, model)[0]), experiment.seeds[0])
            for case in experiment.cases for model in experiment.models_of(case) if models is None or model in models}
    possible = {pair: job for pair, job in jobs.items() if not experiment.needs_of(*pair, elsewhere=True)}
    gpu = experiment.gpu and bool(experiment.needs)
    numbers = described(experiment, possible, programs, gpu)
    lacking = {}
    for case, model in (pair for pair in jobs if pair not in possible):
        lacking.setdefault((case, experiment.needs_of(case, model, elsewhere=True)), []).append((case, model))
    for pairs in lacking.values():
        with contextlib.suppress(SweepError):  # the `needs` say why
            numbers |= described(experiment, {pair: jobs[pair] for pair in pairs}, programs, gpu)
    return [_row(experiment, *pair, numbers.get(pair)) for pair in jobs]


def _gib(value):
    return "-" if value is None else f"{value / GIB:,.0f}" if value >= 100 * GIB else f"{value / GIB:.3g}"


def _count(value, unit=1, suffix=""):
    return "-" if value is None else f"{value / unit:,.2f}{suffix}" if unit > 1 else f"{value:,}"


def dry_run_text(experiment, found):
    """A table; what rows need stands below it, by number."""
    table, reasons = [["case", "model", "parameters", "tokens", "steps", "weights GiB", "activations GiB", "GiB", "needs"]], {}
    for row in found:
        known = row.weights is not None and (row.activations is not None or not experiment.trains)
        number = reasons.setdefault(row.needs, len(reasons) + 1) if row.needs else ""
        table.append([row.case, row.model, _count(row.parameters, 1e6, " M"), _count(row.tokens, 1e6, " M"), _count(row.steps),
                      _gib(row.weights), _gib(row.activations), _gib(row.weights + (row.activations or 0)) if known else "-",
                      f"({number})" if number else ""])
    lines = [f"{experiment.name}: {len(found)} rows", *(line.rstrip() for line in aligned(table))]
    lines += [f"  ({number}) not run here: needs {needs}" for needs, number in reasons.items()]
    return "\n".join(lines) + "\n"
