"""What a sweep leaves for its reader: table.md, and with it results.csv, curves.csv and the figures."""

import math

from .drawing import draw
from .execution import write_atomically
from .progress import duration
from .results import csv_text, curves_text


def number(value):
    return "" if value is None else "never" if value == math.inf else f"{value:.4g}"


def table_head(experiment):
    measures = [f"paper: {experiment.measure}", "ours", "difference"] if experiment.source else [experiment.measure]
    return ["model", "parameters", "learning rate", *measures, *experiment.columns, "steps", "cost"]


def model_row(results, case, model):
    """Cells of a model's row; cost: training time of all its runs."""
    experiment, rows = results.experiment, results.best(case, model)
    paper = experiment.paper.get(case, {}).get(model)
    label = experiment.label(model)
    extra = [""] * len(experiment.columns)

    def beside_paper(ours, difference=""):
        return [number(paper), ours, difference] if experiment.source else [ours]

    if not rows:
        return [label, "", "", *beside_paper(results.missing_reason(case, model)), *extra, "", ""]
    ours = results.mean(rows, experiment.measure)
    values = [row.measures[experiment.measure] for row in rows]
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    cost = sum(row.seconds for row in results.of(case, model) if row.finished)
    rate, steps = (f"{rows[0].job.learning_rate:g}", f"{rows[0].steps:,}") if experiment.trains else ("", "")
    difference = f"{ours - paper:+.4g}" if paper is not None else ""
    return [label, f"{rows[0].parameters:,}", rate, *beside_paper(number(ours) + spread, difference),
            *(number(results.mean(rows, column)) for column in experiment.columns), steps, duration(cost)]


def introduction(experiment):
    return f"{experiment.source}. {experiment.about}" if experiment.source else experiment.about


CLAIM_HEAD = ["claim", "paper", "checked", "measured", "holds", "asserted"]


def claim_row(verdict, code="{}", emphasis="{}"):
    holds = {True: "yes", False: emphasis.format("no"),
             None: "not judged: no " + ", ".join(verdict.missing)}[verdict.holds]
    measured = ", ".join(f"{name} {number(value)}" for name, value in verdict.values.items())
    return [verdict.claim["text"], verdict.claim.get("paper", ""), code.format(verdict.claim["expect"]), measured, holds,
            "yes" if verdict.asserted else "no"]


# By whether rows have several learning rates.
RATE = {frozenset({True}): "at the best learning rate", frozenset({False}): "at one learning rate each, not searched",
        frozenset({True, False}): "at the best learning rate of the rows that have several, the others at their only one"}


def notes(results):
    """What a reader of the numbers has to know, in sentences."""
    experiment = results.experiment
    told = []
    several = {len(experiment.rates(case, model)) > 1 for case in experiment.cases for model in experiment.models_of(case)}
    if experiment.trains:
        seeds, rate = ", ".join(map(str, experiment.seeds)), RATE[frozenset(several)]
        told.append(f"Means over seeds {seeds} {rate} (in parentheses: least to largest)" if len(experiment.seeds) > 1 else
                    f"One seed, {seeds}, {rate}")
        told[-1] += "; steps: of one run; cost: training time of all runs of a row."
    if experiment.chosen_by != experiment.measure:
        told.append(f"The learning rate is chosen by {experiment.chosen_by}, not by {experiment.measure}.")
    elif True in several:
        told.append("The learning rate is chosen on the samples that are reported.")
    if experiment.measure_at is not None:
        told.append(f"Held-out metrics are those of step {experiment.measure_at:,}.")
    if experiment.evaluate_best:
        told.append("Evaluated after training is each run's checkpoint of the lowest held-out loss.")
    if left := [row for row in results.rows if not row.finished]:
        failed = sum(row.status == "failed" for row in left)
        told.append(f"{len(left)} of {len(results.rows)} runs are not finished"
                    f"{f', {failed} of them failed' if failed else ''}: learning rates that lack one are left out.")
    if machines := results.machines():
        told.append(f"Measured on {'; '.join(machines)}.")
    if stale := results.stale():
        told.append(f"{len(stale)} of {len(results.rows)} runs were made with other settings than the description has now.")
    return told


def title(experiment):
    return f"{experiment.title}{': miniature' if experiment.mini else ''}"


def markdown_row(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table_text(results, figures=()):
    experiment = results.experiment
    lines = [f"# {title(experiment)}", "", introduction(experiment), "", " ".join(notes(results))]
    for case in experiment.cases:
        head = table_head(experiment)
        if case_title := experiment.case_title(case):
            lines += ["", f"## {case_title}"]
        lines += ["", markdown_row(head), markdown_row(["---"] * len(head))]
        lines += [markdown_row(model_row(results, case, model)) for model in experiment.models_of(case)]
    if experiment.claims:
        lines += ["", "## Claims", "", markdown_row(CLAIM_HEAD), markdown_row(["---"] * len(CLAIM_HEAD))]
        lines += [markdown_row(claim_row(verdict, "`{}`", "**{}**")) for verdict in results.verdicts()]
    for path in figures:
        lines += ["", f"![{path.stem}]({path.name})"]
    return "\n".join(lines) + "\n"


def write(results, folder):
    """results.csv, curves.csv, the figures where matplotlib is there, and table.md; returns the figures' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", csv_text(results))
    if any(row.curves for row in results.rows):
        write_atomically(folder / "curves.csv", curves_text(results))
    else:
        (folder / "curves.csv").unlink(missing_ok=True)  # of other runs
    figures = draw(results, folder)
    write_atomically(folder / "table.md", table_text(results, figures))
    return figures
