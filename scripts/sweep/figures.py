"""Figures of an experiment as data: what its description asks for, looked up in its results. drawing.py draws them.

A figure of a description, `figures: {name: {...}}`:
  kind    bars | heatmap | lines
  y       a measure (absent: the experiment's), or {x value: measure}: what is measured at several places, as perplexities
          at several lengths or of several kinds of tokens
  x       what lies along the axis; lines want numbers:
            cases, models        their labels (cases is the default of heatmaps, and of bars where there are several)
            measures             the keys of y (the default where y has keys)
            evaluation.OPTION    that option of every evaluation that has it; y is then the part behind its name
            steps, tokens        the course of a held-out metric y (steps is the default of lines)
            learning_rate        every learning rate; all else takes the best one
            parameters           of the model
            a.setting            value of a setting, as model.embedding_dim or data.seq_len
  series  what has a colour, or a row of a heatmap: models (default), cases or a.setting
  panels  what has a plot of its own: cases, models, a.setting or a list of these; absent: one plot
  models, cases   lists: these alone
  log     x, y or xy: logarithmic axes; title, x_label, y_label: texts
Values are means over the seeds, whiskers their least and largest; crosses are the paper's values, where y is the measure
that the description's `paper` tells.
"""

import dataclasses
import math
import statistics

from .execution import METRICS

KINDS = ("bars", "heatmap", "lines")
KEYS = {"kind", "x", "y", "series", "panels", "models", "cases", "log", "title", "x_label", "y_label"}
WORDS = {"x": ("cases", "models", "measures", "steps", "tokens", "learning_rate", "parameters"),
         "series": ("models", "cases"), "panels": ("models", "cases")}
CATEGORIES = ("cases", "models", "measures")


@dataclasses.dataclass
class Point:
    x: object  # number or text
    value: float
    low: float
    high: float


@dataclasses.dataclass
class Series:
    label: str
    points: list
    paper: list = dataclasses.field(default_factory=list)  # (x, value)


@dataclasses.dataclass
class Panel:
    label: str
    series: list


@dataclasses.dataclass
class Figure:
    name: str
    kind: str
    title: str
    x_label: str
    y_label: str
    log: str
    panels: list


def problem(figure, experiment):
    """What is wrong with a figure of a description; "" if nothing is."""
    if not isinstance(figure, dict) or figure.get("kind") not in KINDS:
        return f"kind is one of {', '.join(KINDS)}"
    if unknown := sorted(set(figure) - KEYS):
        return f"unknown key {unknown[0]}; expected {', '.join(sorted(KEYS))}"
    for key, words in WORDS.items():
        for what in _parts(figure[key]) if key in figure else ():
            if what not in words and "." not in str(what) or what != figure[key] and key != "panels":
                return f"{key}: {figure[key]} is neither a setting nor one of {', '.join(words)}"
    for key, known in (("models", experiment.models), ("cases", experiment.cases)):
        if unknown := [name for name in figure.get(key, []) if name not in known]:
            return f"{key}: there is no {unknown[0]}"
    x = axis(figure, experiment)
    if isinstance(figure.get("y"), dict) != (x == "measures"):
        return "x: measures and y with keys go together"
    if figure["kind"] == "lines" and (x in CATEGORIES[:2] or x == "measures" and not all(map(_is_number, figure["y"]))):
        return f"lines want numbers along x, {x} has none"
    if figure.get("log", "") not in ("", "x", "y", "xy"):
        return "log is x, y or xy"
    return _problem_of_measures(figure, experiment, x) or _problem_of_places(figure, experiment, x)


def _problem_of_measures(figure, experiment, x):
    y = figure.get("y", experiment.measure)
    if x in ("steps", "tokens"):
        return "" if y in METRICS else f"y: {y} has no course over {x}; expected one of {', '.join(METRICS)}"
    if x.startswith("evaluation."):
        measures = [measure for _, measure in evaluations_along(experiment, x, y)]
        if not measures:
            return f"x: no evaluation has the option {x.split('.', 1)[1]}"
    else:
        measures = y.values() if isinstance(y, dict) else [y]
    return next((f"y: nothing measures {measure}" for measure in measures if not experiment.is_measured(measure)), "")


def evaluations_along(experiment, x, y):
    """(place, measure) of the evaluations along an axis `evaluation.OPTION`."""
    option = x.split(".", 1)[1]
    return sorted((options[option], f"{name}.{y}") for name, options in experiment.evaluations.items() if option in options)


def _problem_of_places(figure, experiment, x):
    places = {}
    for case, model in pairs(figure, experiment):
        place = _place(experiment, x, case, model) if x != "parameters" else (case, model)
        if figure["kind"] == "lines" and _is_setting(x) and place is not None and not _is_number(place):
            return f"lines want numbers along x, {x} is {place}"
        key = (*_panel_and_series(figure, experiment, case, model), place)
        if key in places and None not in key:
            return f"{places[key]} and {case}.{model} fall on the same place; tell them apart by series or panels"
        places[key] = f"{case}.{model}"
    return ""


def pairs(figure, experiment):
    return [(case, model) for case in figure.get("cases", experiment.cases) for model in experiment.models_of(case)
            if model in figure.get("models", experiment.models)]


def _panel_and_series(figure, experiment, case, model):
    series = figure.get("series", "cases" if axis(figure, experiment) == "models" else "models")
    return [_coordinate(experiment, what, case, model) for what in (figure.get("panels"), series)]


def _parts(panels):
    return panels if isinstance(panels, list) else [panels]


def _coordinate(experiment, what, case, model):
    """Label of a pair in a series, a panel or along an axis; None where the setting is not there."""
    if what is None:
        return ""
    if isinstance(what, list):
        labels = [_coordinate(experiment, part, case, model) for part in what]
        return None if None in labels else ", ".join(labels)
    if what == "cases":
        return experiment.case_label(case)
    if what == "models":
        return experiment.label(model)
    value = experiment.setting(what, case, model)
    return None if value is None else f"{_last_name(what)} {value}"


def _place(experiment, x, case, model):
    """Where along x a pair stands, where that does not depend on what was measured."""
    if x in ("cases", "models"):
        return _coordinate(experiment, x, case, model)
    return experiment.setting(x, case, model) if _is_setting(x) else ""


def _last_name(path):
    return path.split(".")[-1].replace("_", " ")


def _is_setting(x):
    return "." in x and not x.startswith("evaluation.")


def axis(figure, experiment):
    one_case = len(figure.get("cases", experiment.cases)) == 1 and "series" not in figure
    default = {"lines": "steps", "heatmap": "cases", "bars": "models" if one_case else "cases"}[figure["kind"]]
    return figure.get("x", "measures" if isinstance(figure.get("y"), dict) else default)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Resolver:
    """One figure over the results of an experiment."""

    def __init__(self, results, figure):
        self.results, self.experiment, self.figure = results, results.experiment, figure
        self.x = axis(figure, self.experiment)
        self.y = figure.get("y", self.experiment.measure)

    def _point(self, x, rows, measure):
        values = [row.measures[measure] for row in rows if math.isfinite(row.measures.get(measure, math.nan))]
        if x is None or not values or len(values) < len(rows):
            return []
        return [Point(x, statistics.mean(values), min(values), max(values))]

    def _course(self, rows):
        """The metric over the steps at which every seed was evaluated."""
        courses = [row.curves.get(self.y, {}) for row in rows]
        steps = sorted(set.intersection(*(set(course) for course in courses))) if courses else []
        scale = self.experiment.tokens_per_step(rows[0].job) if self.x == "tokens" and rows else 1
        columns = [(step, [course[step] for course in courses]) for step in steps]
        return [Point(step * scale, statistics.mean(v), min(v), max(v)) for step, v in columns]

    def evaluations(self):
        return evaluations_along(self.experiment, self.x, self.y)

    def points(self, case, model):
        best = self.results.best(case, model)
        if self.x in ("steps", "tokens"):
            return self._course(best)
        if self.x == "learning_rate":
            rates = self.results.by_rate(case, model)
            return [p for rate in sorted(rates) for p in self._point(rate, rates[rate], self.y)]
        if self.x == "measures":
            return [p for x, measure in self.y.items() for p in self._point(x, best, measure)]
        if self.x.startswith("evaluation."):
            return [p for x, measure in self.evaluations() for p in self._point(x, best, measure)]
        return self._point(self.place(case, model), best, self.y)

    def place(self, case, model):
        if self.x == "parameters":
            return next((row.parameters for row in self.results.of(case, model) if row.parameters), None)
        return _place(self.experiment, self.x, case, model)

    def paper(self, case, model):
        value = self.experiment.paper.get(case, {}).get(model)
        if value is None or self.x in ("steps", "tokens", "learning_rate"):
            return []
        if self.x == "measures":
            places = self.y.items()
        elif self.x.startswith("evaluation."):
            places = self.evaluations()
        else:
            places = [(self.place(case, model), self.y)]
        return [(x, value) for x, measure in places if x is not None and measure == self.experiment.measure]

    def resolve(self, name):
        figure, panels = self.figure, {}
        for case, model in pairs(figure, self.experiment):
            panel, label = _panel_and_series(figure, self.experiment, case, model)
            points, paper = self.points(case, model), self.paper(case, model)
            if panel is None or label is None or not (points or paper):
                continue
            series = panels.setdefault(panel, {}).setdefault(label, Series(label, []))
            series.points += points
            series.paper += paper
        if self.x not in CATEGORIES:
            for series in (s for panel in panels.values() for s in panel.values()):
                series.points.sort(key=lambda point: point.x)
                series.paper.sort()
        y_label = figure.get("y_label", self.y.replace("_", " ") if isinstance(self.y, str) else "")
        x_label = figure.get("x_label", "" if self.x in CATEGORIES else _last_name(self.x))
        return Figure(name, figure["kind"], figure.get("title", ""), x_label, y_label, figure.get("log", ""),
                      [Panel(label, list(series.values())) for label, series in panels.items()])


def resolve(results, name, figure):
    return Resolver(results, figure).resolve(name)
