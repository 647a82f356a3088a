"""results.csv and table.md of a sweep."""

import csv
import io
import math
import statistics

from .claims import Missing, judge
from .execution import write_atomically
from .progress import duration


def number(value):
    return "" if value is None else "never" if value == math.inf else f"{value:.4g}"


class Results:
    """What the runs of a sweep measured, by case and model."""

    def __init__(self, sweep):
        self.experiment, self.runs, self.models = sweep.experiment, sweep.runs, sweep.models

    def of(self, case, model):
        return [run for run in self.runs if (run.job.case, run.job.model) == (case, model)]

    def best(self, case, model):
        """Runs at the learning rate with the best mean, all its seeds finished without divergence; [] if there is none."""
        by_rate = {}
        for run in self.of(case, model):
            by_rate.setdefault(run.job.learning_rate, []).append(run)
        whole = [runs for runs in by_rate.values() if all(r.result and not r.result["diverged"] for r in runs)]
        sign = 1 if self.experiment.better == "higher" else -1
        return max(whole, default=[], key=lambda runs: sign * self.mean(runs, self.experiment.measure))

    @staticmethod
    def mean(runs, measure):
        values = [run.result["measures"].get(measure) for run in runs]
        if not values or None in values:
            return None
        return math.inf if math.inf in values else statistics.mean(values)

    def missing_reason(self, case, model):
        runs = self.of(case, model)
        if needs := self.experiment.needs_of(case, model):
            return f"not run: needs {needs}"
        if self.models is not None and model not in self.models:
            return "not run: left out by --only"
        if failed := [run for run in runs if run.failure]:
            return f"not run: {failed[0].failure}"
        if unfinished := [run for run in runs if run.result is None]:
            return f"not run: {len(unfinished)} of {len(runs)} runs are unfinished"
        return "diverged at every learning rate"

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


def csv_text(results):
    measures = sorted({m for run in results.runs if run.result for m in run.result["measures"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["case", "model", "learning_rate", "seed", "status", "parameters", "steps", "seconds", *measures])
    for run in results.runs:
        job, result = run.job, run.result
        status = ("diverged" if result["diverged"] else "done") if result else "failed" if run.failure else "unfinished"
        told = result or {"parameters": "", "steps": "", "seconds": "", "measures": {}}
        writer.writerow([job.case, job.model, f"{job.learning_rate:g}", job.seed, status, told["parameters"], told["steps"],
                         told["seconds"], *(told["measures"].get(m, "") for m in measures)])
    return out.getvalue()


def model_row(results, case, model):
    experiment, runs = results.experiment, results.best(case, model)
    paper = experiment.paper.get(case, {}).get(model)
    label = experiment.label(model)
    extra = [""] * len(experiment.columns)
    if not runs:
        return [label, "", "", number(paper), results.missing_reason(case, model), "", *extra, ""]
    ours = results.mean(runs, experiment.measure)
    values = [run.result["measures"][experiment.measure] for run in runs]
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    cost = sum(run.result["seconds"] for run in results.of(case, model) if run.result)
    rate = f"{runs[0].job.learning_rate:g}" if experiment.trains else ""
    return [label, f"{runs[0].result['parameters']:,}", rate, number(paper),
            number(ours) + spread, f"{ours - paper:+.4g}" if paper is not None else "",
            *(number(results.mean(runs, column)) for column in experiment.columns), duration(cost)]


def markdown_row(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table_text(results):
    experiment = results.experiment
    lines = [f"# {experiment.title}{': miniature' if experiment.mini else ''}", "", f"{experiment.source}. {experiment.about}",
             "", f"Means over seeds {experiment.seeds} at the best learning rate; cost: training time of all runs of a row."]
    for case in experiment.cases:
        head = ["model", "parameters", "learning rate", f"paper: {experiment.measure}", "ours", "difference",
                *experiment.columns, "cost"]
        lines += ["", f"## {experiment.case_label(case)}", "", markdown_row(head), markdown_row(["---"] * len(head))]
        lines += [markdown_row(model_row(results, case, model)) for model in experiment.models_of(case)]
    if experiment.claims:
        lines += ["", "## Claims", "", markdown_row(["claim", "paper", "checked", "measured", "holds", "asserted"]),
                  markdown_row(["---"] * 6)]
    for verdict in results.verdicts():
        holds = {True: "yes", False: "**no**", None: "not judged: no " + ", ".join(verdict.missing)}[verdict.holds]
        measured = ", ".join(f"{name} {number(value)}" for name, value in verdict.values.items())
        lines.append(markdown_row([verdict.claim["text"], verdict.claim.get("paper", ""), f"`{verdict.claim['expect']}`",
                                   measured, holds, "yes" if verdict.asserted else "no"]))
    return "\n".join(lines) + "\n"


def write(results, folder):
    write_atomically(folder / "results.csv", csv_text(results))
    write_atomically(folder / "table.md", table_text(results))
