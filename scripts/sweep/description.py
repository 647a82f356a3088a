"""Experiments: scripts/reproduce/<id>/experiment.yaml (full size) and mini.yaml (what differs in the miniature).

Keys of a description:
  title, source, about   texts of the report; without a source the tables have no columns for a paper's values
  needs, files, gpu      what it takes, a text. Where one of `files` (paths) is missing or, with `gpu: true`, no GPU is seen
                         (CUDA_VISIBLE_DEVICES, nvidia-smi), nothing is run and the rows tell `needs`; "": neither counts
  base                   settings of xlstm-train that all runs share
  cases                  {name: {label, config, needs, files}}: tasks or sizes, each crossed with every model; one "all" if
                         absent; `files`: a path or several, `needs` counts only where one of them is missing
  models                 {name: {label, config, learning_rates, needs, cases}}; `needs`: why it cannot be run, a row without
                         numbers; `cases`: {case: {config, learning_rates, needs}}, the only cases it takes part in
  grid                   [{name: {label, config, learning_rates, needs}}, ...]: further cases, one for each combination of a
                         part of every axis, merged, their names joined by _; what `cases` has of that name is merged into it
  learning_rates, seeds  lists; the learning rate with the best mean over the seeds counts, per case and model
  chosen_by              the measure whose mean that is, where it is not `measure` itself: of samples held out to choose by
  trains                 false: nothing is trained, the evaluations are all, and no other run is beside one of these
  decay_to               share of the learning rate at which its schedule ends; else optim.min_lr of the settings counts
  evaluations            {name: options of xlstm-eval, or of another `program`}, run after training: what it writes with
                         --json is measured as <name>.<metric>, within groups <name>.<group>.<metric>
  reach                  {name: {metric, at_least}}: first step whose held-out metric is that good, measured as <name>
  measure, better        the measure that decides (a held-out metric, accuracy, or one of the above); higher | lower
  measure_at             a step: held-out metrics are those of the evaluation there, not of the last one
  evaluate_best          true: the evaluations are of the checkpoint of the lowest held-out loss, not of the last one; so
                         ckpt.keep_best has to be true
  columns                further measures of the table
  paper                  {case: {model: value of `measure`}}
  claims                 [{text, paper, expect, case, asserted}], see claims.py
  figures                {name: {kind: bars | heatmap | lines, y, x, series, panels, ...}}, see figures.py; absent: bars of
                         `measure`
Settings are merged in the order base, case, model, the model's case, then learning rate and seed. mini.yaml: `base`, `models`
and `cases: {name: null}` are merged into the full size, null takes something away; every other key replaces the full one.
{here} in a text of the settings is the description's folder.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import yaml

from . import figures
from .claims import ClaimError, evaluate, names
from .execution import METRICS
from .machine import visible_gpus

FIRST_SHUFFLE_SEED = 1234
HERE = "{here}"
MERGED = ("base", "models", "cases")
KEYS = {"title", "source", "about", "needs", "base", "cases", "grid", "models", "learning_rates", "seeds", "trains", "decay_to",
        "evaluations", "evaluate_best", "reach", "measure", "measure_at", "chosen_by", "better", "columns", "paper", "claims",
        "figures", "files", "gpu"}
PART_KEYS = {"label", "config", "needs", "files", "learning_rates"}
PROGRAMS = ("xlstm-eval", "xlstm-bench")
CLAIM_KEYS = {"text", "paper", "expect", "case", "asserted"}


class DescriptionError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run of a sweep."""

    case: str
    model: str
    learning_rate: float
    seed: int

    @property
    def name(self):
        return f"{self.case}/{self.model}/lr{self.learning_rate:g}_seed{self.seed}"


def merge(below, above):
    """Nested dictionaries, `above` winning; a null there removes."""
    if not isinstance(above, dict):
        return above
    merged = dict(below) if isinstance(below, dict) else {}
    for key, value in above.items():
        merged[key] = merge(merged.get(key), value)
    return {key: value for key, value in merged.items() if value is not None}


def key_given_twice(node):
    """Where in a YAML tree a mapping has a key twice, of which YAML would silently keep the last; "" if nowhere."""
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                return f"line {key.start_mark.line + 1}: {key.value} is given twice"
            keys.add(key.value)
        children = [value for _, value in node.value]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    return next(filter(None, map(key_given_twice, children)), "")


def read_yaml(path):
    try:
        text = path.read_text(encoding="utf-8")
        content, problem = yaml.safe_load(text), key_given_twice(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise DescriptionError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DescriptionError(f"{path}: {error}") from error
    if problem:
        raise DescriptionError(f"{path}: {problem}")
    if not isinstance(content, dict):
        raise DescriptionError(f"{path}: expected the keys of an experiment")
    unknown = sorted(set(content) - KEYS)
    if unknown:
        raise DescriptionError(f"{path}: unknown key {unknown[0]}; expected {', '.join(sorted(KEYS))}")
    return content


def combinations(grid, path):
    """Cases of a grid: names joined by _, labels by commas, the rest merged."""
    if not isinstance(grid, list) or not all(isinstance(axis, dict) and all(isinstance(part, dict) for part in axis.values())
                                             for axis in grid):
        raise DescriptionError(f"{path}: grid: expected a list of axes, {{name: {{label, config, ...}}}} each")
    found = {}
    for combination in itertools.product(*(axis.items() for axis in grid)) if grid else ():
        names, parts = zip(*combination)
        label = ", ".join(str(part.get("label", name)) for name, part in combination)
        found["_".join(names)] = {**functools.reduce(merge, parts, {}), "label": label}
    return found


def with_grid(content, path):
    """The description with the grid's cases among the others."""
    cases, given = combinations(content.get("grid") or [], path), content.get("cases") or {}
    return {**content, "cases": cases | {name: merge(cases.get(name), part) if name in cases else part
                                         for name, part in given.items()}}


def miniature(full, small, path):
    """The full size with what is other in the miniature."""
    if "grid" in small:  # its cases go, whatever else the full size says of them
        gone = combinations(full.get("grid") or [], path)
        cases = {name: part for name, part in full["cases"].items() if name not in gone}
        full = {**full, "cases": cases | combinations(small["grid"] or [], path)}
    for key in ("cases", "models"):
        for name, part in small.get(key, {}).items():
            if part is None and name not in full.get(key, {}):
                raise DescriptionError(f"{path}: {key}: there is no {name} to take away")
    content = {**full, **{key: merge(full.get(key, {}), part) if key in MERGED else part for key, part in small.items()}}
    for model in content.get("models", {}).values():
        if "cases" in model:
            model["cases"] = {case: part for case, part in model["cases"].items() if case in content["cases"]}
    return content


def replace(settings, old, new):
    """The settings with every text's `old` replaced."""
    if isinstance(settings, dict):
        return {key: replace(value, old, new) for key, value in settings.items()}
    if isinstance(settings, list):
        return [replace(value, old, new) for value in settings]
    return settings.replace(old, new) if isinstance(settings, str) else settings


class Experiment:
    def __init__(self, folder, mini=False):
        self.id, self.mini, self.folder = folder.name, mini, folder
        self.source_file = folder / ("mini.yaml" if mini else "experiment.yaml")
        content = with_grid(read_yaml(folder / "experiment.yaml"), folder / "experiment.yaml")
        if mini:
            content = miniature(content, read_yaml(self.source_file), self.source_file)
        self._read(content)

    def _read(self, content):
        self.trains = content.get("trains", True)
        for key in ("title", "base", "models", "learning_rates" if self.trains else "evaluations", "measure"):
            if not content.get(key):
                raise DescriptionError(f"{self.source_file}: {key} is missing")
        self.title, self.source = content["title"], content.get("source") or ""
        self.about, self.needs = content.get("about", ""), content.get("needs") or ""
        self.files, self.gpu = content.get("files"), content.get("gpu", False)
        if (self.files or self.gpu) and content.get("needs") is None:
            raise DescriptionError(f"{self.source_file}: files or gpu, but no needs to say what is missing without them")
        self.base = content["base"]
        self.cases = content.get("cases") or {"all": {}}
        self.models = content["models"]
        self.learning_rates, self.seeds = content.get("learning_rates") or [0.0], content.get("seeds", [0])
        self.decay_to = content.get("decay_to")
        self.evaluations = content.get("evaluations") or {}
        self.reach = content.get("reach") or {}
        self.measure, self.better = content["measure"], content.get("better", "higher")
        self.chosen_by = content.get("chosen_by") or self.measure
        self.measure_at, self.evaluate_best = content.get("measure_at"), content.get("evaluate_best", False)
        self.columns = content.get("columns") or []
        self.paper, self.claims = content.get("paper") or {}, content.get("claims") or []
        self.figures = content.get("figures", {self.measure.replace(".", "_"): {"kind": "bars"}}) or {}
        self._check()

    def is_measured(self, measure):
        """Whether a run of this experiment can tell it; what groups a program reports is not known here."""
        evaluation, _, rest = str(measure).partition(".")
        if evaluation in self.evaluations:
            return rest in METRICS or "." in rest
        return measure in METRICS or measure in self.reach

    def _check(self):
        def expect(condition, message):
            if not condition:
                raise DescriptionError(f"{self.source_file}: {message}")

        expect(self.better in ("higher", "lower"), f"better is {self.better}, expected higher or lower")
        for kind, parts in (("cases", self.cases), ("models", self.models)):
            for name, part in parts.items():
                expect(isinstance(part, dict), f"{kind}.{name}: expected label, config and so on, got {part}")
                expect(str(name).isidentifier(), f"{kind}: {name} is not a name of letters, digits and _")
                known = PART_KEYS | ({"cases"} if kind == "models" else set())
                unknown = sorted(set(part) - known)
                expect(not unknown, f"{kind}.{name}: unknown key {unknown[:1]}; expected {sorted(known)}")
                expect(not part.get("files") or part.get("needs"), f"{kind}.{name}: files, but no needs to say what they are")
        for name, model in self.models.items():
            for case, part in model.get("cases", {}).items():
                expect(case in self.cases, f"models.{name}.cases: there is no case {case}")
                unknown = sorted(set(part) - PART_KEYS)
                expect(not unknown, f"models.{name}.cases.{case}: unknown key {unknown[:1]}; expected {sorted(PART_KEYS)}")
        for name, options in self.evaluations.items():
            expect(str(name).isidentifier(), f"evaluations: {name} is not a name of letters, digits and _")
            expect(isinstance(options, dict), f"evaluations.{name}: expected options of a program, got {options}")
            program = options.get("program", PROGRAMS[0])
            expect(program in PROGRAMS, f"evaluations.{name}: program {program}, expected one of {', '.join(PROGRAMS)}")
            expect(self.trains or program != PROGRAMS[0], f"evaluations.{name}: xlstm-eval needs a trained model")
        for case, values in self.paper.items():
            for model in values:
                expect(case in self.cases and model in self.models, f"paper: there is no {case}.{model}")
        for name, goal in self.reach.items():
            expect(isinstance(goal, dict) and set(goal) == {"metric", "at_least"} and goal["metric"] in METRICS,
                   f"reach.{name}: expected metric, one of {', '.join(METRICS)}, and at_least")
        for measure in (self.measure, self.chosen_by, *self.columns):
            expect(self.is_measured(measure), f"nothing measures {measure}; expected {self._measures_text()}")
        self._check_jobs(expect)
        if self.measure_at is not None:
            self._check_measure_at(expect)
        if self.evaluate_best is not False:
            self._check_evaluate_best(expect)
        for claim in self.claims:
            self._check_claim(claim, expect)
        for name, figure in self.figures.items():
            expect(str(name).isidentifier(), f"figures: {name} is not a name of letters, digits and _")
            problem = figures.problem(figure, self)
            expect(not problem, f"figures.{name}: {problem}")

    def _measures_text(self):
        return f"{', '.join([*METRICS, *self.reach])}{', or' if self.evaluations else ''} " + ", ".join(
            f"{name}.METRIC" for name in self.evaluations)

    def _check_jobs(self, expect):
        """Lists of learning rates and seeds, in which nothing is twice: two runs would be one folder's."""
        rates = [self.rates(case, model) for case in self.cases for model in self.models_of(case)]
        for name, values in (("seeds", self.seeds), *(("learning_rates", values) for values in rates)):
            try:
                different = {float(value) for value in values}
            except (TypeError, ValueError):
                different = set()
            expect(isinstance(values, list) and 0 < len(different) == len(values),
                   f"{name}: expected a list of different numbers, got {values}")

    def _check_measure_at(self, expect):
        """It is a step of every run, and evaluated there."""
        expect(self.trains and self.measure in METRICS, f"measure_at: {self.measure} is not measured while it trains")
        for job in self.jobs(elsewhere=True):
            every, steps = self.setting("eval.every", job.case, job.model), self.steps(job)
            expect(every and 0 < self.measure_at <= steps and (self.measure_at == steps or self.measure_at % every == 0),
                   f"measure_at: {job.case}.{job.model} is evaluated every {every} of {steps} steps, not at {self.measure_at}")

    def _check_evaluate_best(self, expect):
        """The trainer keeps it, and there is something to evaluate."""
        expect(self.evaluate_best is True, f"evaluate_best: expected true or false, got {self.evaluate_best}")
        expect(any(options.get("program", PROGRAMS[0]) == PROGRAMS[0] for options in self.evaluations.values()),
               "evaluate_best: no evaluation is by xlstm-eval")
        for case in self.cases:
            for model in self.models_of(case):
                expect(self.setting("ckpt.keep_best", case, model),
                       f"evaluate_best: the best checkpoint of {case}.{model} is not kept (ckpt.keep_best)")

    def _check_claim(self, claim, expect):
        expect(isinstance(claim, dict) and {"text", "expect"} <= claim.keys(), "every claim needs text and expect")
        about, case = f"claim {claim['text']}", claim.get("case", self.only_case)
        unknown = sorted(set(claim) - CLAIM_KEYS)
        expect(not unknown, f"{about}: unknown key {unknown[:1]}; expected {sorted(CLAIM_KEYS)}")
        expect(case in self.cases, f"{about}: which case?")
        try:
            evaluate(claim["expect"], lambda model, measure: 1.0)
        except ClaimError as error:
            raise DescriptionError(f"{self.source_file}: {about}: {error}") from error
        for model, measure in names(claim["expect"]):
            expect(model in self.models, f"{about}: there is no model {model}")
            expect(model in self.models_of(case), f"{about}: {model} takes no part in {case}")
            expect(self.is_measured(measure), f"{about}: nothing measures {measure}; expected {self._measures_text()}")

    @property
    def only_case(self):
        return next(iter(self.cases)) if len(self.cases) == 1 else None

    @property
    def name(self):
        return self.id + ("-mini" if self.mini else "")

    def label(self, model):
        return self.models[model].get("label", model)

    def case_label(self, case):
        return self.cases[case].get("label", case)

    def case_title(self, case):
        """The label of a case over its table; "" of an only case that has none of its own."""
        return "" if self.only_case and "label" not in self.cases[case] else self.case_label(case)

    def models_of(self, case):
        return [model for model, part in self.models.items() if "cases" not in part or case in part["cases"]]

    def _own(self, case, model):
        """What the model has for this case alone."""
        return self.models[model].get("cases", {}).get(case, {})

    def needs_of(self, case, model, elsewhere=False):
        """Why this pair cannot be run; empty if it can. elsewhere: where there are a GPU and the files that it reads."""
        parts = (self._own(case, model), self.models[model], self.cases[case])
        own = next((part["needs"] for part in parts if part.get("needs") and not self._has_files(part, elsewhere)), "")
        return own or ("" if elsewhere else self._missing_here)

    @functools.cached_property
    def _missing_here(self):
        """Why nothing of the experiment can be run on this machine; empty if it can."""
        if self.needs and not self._all_there(self.files or []):
            return self.needs
        return f"{self.needs}; no GPU is seen here" if self.needs and self.gpu and not visible_gpus() else ""

    def _has_files(self, part, elsewhere):
        """Whether the files are there for want of which a part cannot be run."""
        return bool(part.get("files")) and (elsewhere or self._all_there(part["files"]))

    def _all_there(self, files):
        paths = replace(files if isinstance(files, list) else [files], HERE, str(self.folder.resolve()))
        return all(Path(path).exists() for path in paths)

    def rates(self, case, model):
        parts = (self._own(case, model), self.models[model], self.cases[case])
        return next((part["learning_rates"] for part in parts if part.get("learning_rates")), self.learning_rates)

    def jobs(self, models=None, elsewhere=False):
        """Learning rates and seeds inside, so that a stopped sweep has whole rows. elsewhere: also what lacks files here."""
        return [Job(case, model, float(rate), seed)
                for case in self.cases for model in self.models_of(case)
                if (models is None or model in models) and not self.needs_of(case, model, elsewhere)
                for rate, seed in itertools.product(self.rates(case, model), self.seeds)]

    def settings(self, job, located=True):
        """Settings of a run, without those of its folder. One seed means the same samples for all models.
        Not located: {here} stays, so that they are the same wherever the description lies."""
        own = {"run": {"seed": job.seed}, "data": {"shuffle_seed": FIRST_SHUFFLE_SEED + job.seed}}
        if self.trains:
            own["optim"] = {"learning_rate": job.learning_rate}
            if self.decay_to is not None:
                own["optim"]["min_lr"] = self.decay_to * job.learning_rate
        merged = self.base
        for part in (self.cases[job.case], self.models[job.model], self._own(job.case, job.model), {"config": own}):
            merged = merge(merged, part.get("config", {}))
        return replace(merged, HERE, str(self.folder.resolve())) if located else merged

    def setting(self, path, case, model):
        """Value of a dotted setting, which the learning rate and the seed do not change; None if it is not there."""
        value = self.settings(Job(case, model, 0.0, 0))
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def tokens_per_step(self, job):
        train, data = (self.settings(job).get(key, {}) for key in ("train", "data"))
        return train.get("global_batch_size", 16) * data.get("seq_len", 256)

    def steps(self, job):
        train = self.settings(job).get("train", {})
        return train.get("max_steps") or -(-train.get("max_tokens", 0) // self.tokens_per_step(job))


def experiment_ids(folder):
    return sorted(path.parent.name for path in Path(folder).glob("*/experiment.yaml"))


def load(folder, experiment_id, mini=False):
    ids = experiment_ids(folder)
    if experiment_id not in ids:
        raise DescriptionError(f"there is no experiment {experiment_id}; there are: {', '.join(ids) or 'none'}")
    return Experiment(Path(folder) / experiment_id, mini)


def load_all(folder, mini=False):
    """Every experiment; and (title, why not) of those without a miniature where that is asked for."""
    found, missing = [], []
    for name in experiment_ids(folder):
        if mini and not (Path(folder) / name / "mini.yaml").exists():
            full = Experiment(Path(folder) / name)
            missing.append((full.title, f"not run: it has no miniature; the full size needs {full.needs or 'a GPU'}"))
        else:
            found.append(Experiment(Path(folder) / name, mini))
    return found, missing
