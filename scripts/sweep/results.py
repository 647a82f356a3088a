"""What a sweep measured: rows of runs, from the sweep itself or from the results.csv and curves.csv it wrote.

The two files hold everything that table, figures and page are made of, so that these can be made again where the runs' own
folders are not: later, elsewhere, or after a change of the description's texts, claims and figures.
"""

import csv
import dataclasses
import io
import math
import statistics

from .claims import Missing, judge
from .description import DescriptionError, Job
from .execution import fingerprint, held_out

RUN_COLUMNS = ["case", "model", "learning_rate", "seed", "status", "failure", "parameters", "steps", "seconds", "machine",
               "settings"]
CURVE_COLUMNS = ["case", "model", "learning_rate", "seed", "step"]
SETTINGS_LETTERS = 12  # of the fingerprint


@dataclasses.dataclass
class Row:
    """One run: its status is done, diverged, failed or unfinished; without a result its numbers are None."""

    job: Job
    status: str
    failure: str = ""
    parameters: int | None = None
    steps: int | None = None
    seconds: float | None = None
    machine: str = ""
    settings: str = ""
    measures: dict = dataclasses.field(default_factory=dict)
    curves: dict = dataclasses.field(default_factory=dict)  # held-out metric -> {step: value}

    @property
    def done(self):
        return self.status == "done"

    @property
    def finished(self):
        return self.status in ("done", "diverged")


def row_of(run, folder):
    settings = run.fingerprint[:SETTINGS_LETTERS]
    curves = held_out(run.records()) if run.experiment.trains else {}
    if run.result is None:
        failure = (run.failure or "").replace(f"{folder}/", "")
        return Row(run.job, "failed" if failure else "unfinished", failure, settings=settings, curves=curves)
    told = run.result
    return Row(run.job, "diverged" if told["diverged"] else "done", "", told["parameters"], told["steps"], told["seconds"],
               told.get("machine", ""), settings, told["measures"], curves)


class Results:
    """Rows of an experiment, by case and model; models: those that took part, None for all."""

    def __init__(self, experiment, rows, models=None):
        self.experiment, self.rows, self.models = experiment, rows, models

    @classmethod
    def of_sweep(cls, sweep):
        return cls(sweep.experiment, [row_of(run, sweep.folder) for run in sweep.runs], sweep.models)

    @classmethod
    def read(cls, experiment, folder):
        """From results.csv and curves.csv. Seeds are those of the file; models without a run count as left out."""
        rows = read_rows(folder / "results.csv")
        if (folder / "curves.csv").exists():
            read_curves(folder / "curves.csv", {row.job: row for row in rows})
        experiment.seeds = sorted({row.job.seed for row in rows}) or experiment.seeds
        there = {row.job.model for row in rows}
        everything = {job.model for job in experiment.jobs(elsewhere=True)} <= there
        return cls(experiment, rows, None if everything else sorted(there))

    def of(self, case, model):
        return [row for row in self.rows if (row.job.case, row.job.model) == (case, model)]

    def by_rate(self, case, model):
        """{learning rate: rows} where every seed finished without divergence and measured."""
        rates = {}
        for row in self.of(case, model):
            rates.setdefault(row.job.learning_rate, []).append(row)
        wanted = {self.experiment.measure, self.experiment.chosen_by}
        return {rate: rows for rate, rows in rates.items() if all(row.done and wanted <= row.measures.keys() for row in rows)}

    def best(self, case, model):
        """Rows at the learning rate with the best mean of the measure that chooses; [] if there is none."""
        sign = 1 if self.experiment.better == "higher" else -1
        return max(self.by_rate(case, model).values(), default=[],
                   key=lambda rows: sign * self.mean(rows, self.experiment.chosen_by))

    @staticmethod
    def mean(rows, measure):
        values = [row.measures.get(measure) for row in rows]
        if not values or None in values:
            return None
        return math.inf if math.inf in values else statistics.mean(values)

    def missing_reason(self, case, model):
        rows = self.of(case, model)
        if not rows and (needs := self.experiment.needs_of(case, model)):
            return f"not run: needs {needs}"
        if self.models is not None and model not in self.models:
            return "not run: left out by --only"
        if failed := [row for row in rows if row.status == "failed"]:
            return f"not run: {failed[0].failure}"
        if unfinished := [row for row in rows if row.status == "unfinished"]:
            return f"not run: {len(unfinished)} of {len(rows)} runs are unfinished"
        return "diverged at every learning rate" if rows else "not run"

    def verdicts(self):
        found = []
        for claim in self.experiment.claims:
            case = claim.get("case", self.experiment.only_case)

            def lookup(model, measure, case=case):
                value = self.mean(self.best(case, model), measure)
                if value is None:
                    raise Missing
                return value

            found.append(judge(claim, lookup))
        return found

    def excused(self, verdict):
        """Whether all that a claim lacks was left out by --only."""
        return self.models is not None and all(name.split(".")[0] not in self.models for name in verdict.missing)

    def wrong(self):
        """Asserted claims that do not hold or could not be judged."""
        return [v for v in self.verdicts() if v.asserted and not v.holds and not (v.holds is None and self.excused(v))]

    def stale(self):
        """Finished rows that were measured with other settings than the description has now."""
        now = {job: fingerprint(self.experiment, job)[:SETTINGS_LETTERS] for job in self.experiment.jobs(elsewhere=True)}
        return [row for row in self.rows if row.finished and now.get(row.job) != row.settings]

    def seconds(self):
        return sum(row.seconds or 0 for row in self.rows)

    def machines(self):
        return sorted({row.machine for row in self.rows if row.machine})


def _job_cells(job):
    return [job.case, job.model, f"{job.learning_rate:g}", job.seed]


def _csv(header, rows):
    """Text of the lines; None is an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def csv_text(results):
    measures = sorted({measure for row in results.rows for measure in row.measures})
    return _csv([*RUN_COLUMNS, *measures], (
        [*_job_cells(row.job), row.status, row.failure, row.parameters, row.steps, row.seconds, row.machine, row.settings,
         *(row.measures.get(measure) for measure in measures)] for row in results.rows))


def curves_text(results):
    metrics = sorted({metric for row in results.rows for metric in row.curves})
    return _csv([*CURVE_COLUMNS, *metrics], (
        [*_job_cells(row.job), step, *(row.curves.get(metric, {}).get(step) for metric in metrics)]
        for row in results.rows for step in sorted({step for values in row.curves.values() for step in values})))


def _read_table(path, columns):
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
    except OSError as error:
        raise DescriptionError(f"{path}: {error.strerror}") from error
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise DescriptionError(f"{path}: there is no column {missing[0]}; reproduce.py wrote it?")
    return lines, [name for name in reader.fieldnames if name not in columns]


def _job(line):
    return Job(line["case"], line["model"], float(line["learning_rate"]), int(line["seed"]))


def _number(text):
    """As it was measured: counts are integers and stay so where a table is written again."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def read_rows(path):
    lines, measures = _read_table(path, RUN_COLUMNS)
    number = lambda text, kind: kind(text) if text else None  # noqa: E731
    try:
        return [Row(_job(line), line["status"], line["failure"], number(line["parameters"], int), number(line["steps"], int),
                    number(line["seconds"], float), line["machine"], line["settings"],
                    {measure: _number(line[measure]) for measure in measures if line[measure]}) for line in lines]
    except (TypeError, ValueError) as error:
        raise DescriptionError(f"{path}: {error}; has it been edited?") from error


def read_curves(path, rows):
    lines, metrics = _read_table(path, CURVE_COLUMNS)
    for line in lines:
        for metric in metrics:
            if line[metric] and (row := rows.get(_job(line))):
                row.curves.setdefault(metric, {})[int(line["step"])] = _number(line[metric])
