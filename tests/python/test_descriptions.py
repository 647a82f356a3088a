"""Descriptions of experiments that are wrong are refused before anything is trained, with the place and the way out."""

import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from sweep.description import DescriptionError, Experiment, merge  # noqa: E402

GOOD = {"title": "Toy", "source": "nowhere", "base": {"train": {"max_steps": 10}}, "models": {"a": {}, "b": {}},
        "learning_rates": [0.1], "measure": "ppl", "evaluations": {"test": {"seq_len": 8}},
        "reach": {"soon": {"metric": "accuracy", "at_least": 0.9}}}


def described(folder, mini=None, **content):
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump({**GOOD, **content}, sort_keys=False))
    if mini is not None:
        (folder / "mini.yaml").write_text(mini)
    return Experiment(folder, mini is not None)


def claim(expect, **more):
    return {"claims": [{"text": "t", "expect": expect, **more}]}


@pytest.mark.parametrize("content, message", [
    (claim("a.ppl < c.ppl"), "claim t: there is no model c"),
    (claim("a.pll < b.ppl"), "claim t: nothing measures pll; expected loss, ppl,"),
    (claim("a.test.pll < 1"), "claim t: nothing measures test.pll"),
    (claim("a.tset.ppl < 1"), "claim t: nothing measures tset.ppl"),
    (claim("a < 1"), "claim t: a < 1: a is not understood"),
    (claim("a.ppl <"), "claim t: a.ppl <: invalid syntax"),
    (claim("open('/etc/passwd').read()"), "is not understood"),
    (claim("abs(a.ppl, 1) < 1"), "abs(a.ppl, 1) has 2 arguments"),
    (claim(3.0), "claim t: 3.0: is no expression"),
    (claim("a.ppl < 1", assert_=True), "claim t: unknown key ['assert_']"),
    (claim("a.ppl < 1", case="other"), "claim t: which case?"),
    ({**claim("b.ppl < 1", case="x"), "cases": {"x": {}, "y": {}}, "models": {"a": {}, "b": {"cases": {"y": {}}}}},
     "claim t: b takes no part in x"),
    ({"measure": "pll"}, "nothing measures pll"),
    ({"columns": ["test.pll"]}, "nothing measures test.pll; expected loss,"),
    ({"reach": {"soon": {"metric": "acc", "at_least": 1}}}, "reach.soon: expected metric, one of loss,"),
    ({"learning_rates": [0.1, 0.1]}, "learning_rates: expected a list of different numbers, got [0.1, 0.1]"),
    ({"learning_rates": 0.1}, "learning_rates: expected a list of different numbers, got 0.1"),
    ({"seeds": []}, "seeds: expected a list"),
    ({"seeds": ["one"]}, "seeds: expected a list"),
    ({"models": {"a": None}}, "models.a: expected label, config and so on, got None"),
    ({"evaluations": {"x/y": {}}}, "evaluations: x/y is not a name"),
    ({"evaluations": {"test": None}}, "evaluations.test: expected options of a program, got None"),
    ({"figures": {"f": {"kind": "bars", "y": "pll"}}}, "figures.f: y: nothing measures pll"),
    ({"figures": {"f": {"kind": "lines", "y": "test.ppl"}}}, "figures.f: y: test.ppl has no course over steps"),
    ({"figures": {"f": {"kind": "lines", "x": "evaluation.size", "y": "ppl"}}}, "no evaluation has the option size"),
])
def test_mistakes_are_named(content, message, tmp_path):
    with pytest.raises(DescriptionError, match="experiment.yaml: .*" + re.escape(message)):
        described(tmp_path / "toy", **content)


def test_what_is_right_is_taken(tmp_path):
    experiment = described(tmp_path / "toy", columns=["soon", "test.ppl", "test.frequency.count_0.ppl"],
                           learning_rates=["1e-3"],
                           **claim("a.soon < b.soon and a.test.frequency.count_0.ppl > min(a.test.loss, 1)"))
    assert [job.learning_rate for job in experiment.jobs()] == [0.001] * 2


@pytest.mark.parametrize("mini, message", [
    ("models: {c: null}", "mini.yaml: models: there is no c to take away"),
    ("cases: {small: null}", "mini.yaml: cases: there is no small to take away"),
    ("base: {}\nmodels:\n  a: {}\n  a: {}\n", "mini.yaml: line 4: a is given twice"),
    ("steps: 3", "mini.yaml: unknown key steps"),
])
def test_mistakes_of_a_miniature(mini, message, tmp_path):
    with pytest.raises(DescriptionError, match=re.escape(message)):
        described(tmp_path / "toy", mini)


GRID = [{"short": {"label": "T 8", "config": {"data": {"seq_len": 8}}},
         "long": {"config": {"data": {"seq_len": 64}}, "learning_rates": [0.5]}},
        {"d1": {"label": "d 1", "config": {"model": {"embedding_dim": 1}}}, "d2": {"config": {"model": {"embedding_dim": 2}}}}]


def test_a_grid_is_a_case_for_each_combination(tmp_path):
    experiment = described(tmp_path / "toy", grid=GRID, cases={"long_d2": {"needs": "time"}, "other": {"label": "Other"}})
    labels = ["T 8, d 1", "T 8, d2", "long, d 1", "long, d2", "Other"]
    assert [experiment.case_label(case) for case in experiment.cases] == labels
    assert [(job.case, job.learning_rate) for job in experiment.jobs(["a"])] == [
        ("short_d1", 0.1), ("short_d2", 0.1), ("long_d1", 0.5), ("other", 0.1)]
    assert experiment.settings(experiment.jobs()[0]) == {
        "train": {"max_steps": 10}, "data": {"seq_len": 8, "shuffle_seed": 1234}, "model": {"embedding_dim": 1},
        "run": {"seed": 0}, "optim": {"learning_rate": 0.1}}
    with pytest.raises(DescriptionError, match="grid: expected a list of axes"):
        described(tmp_path / "wrong", grid={"short": {}})


def test_a_miniature_changes_or_replaces_the_grid(tmp_path):
    cases = {"long_d2": {"needs": "time"}}
    mini = described(tmp_path / "toy", "cases: {short_d1: null, long_d2: {needs: null}}", grid=GRID, cases=cases)
    assert [job.case for job in mini.jobs(["a"])] == ["short_d2", "long_d1", "long_d2"]
    assert list(described(tmp_path / "small", "grid: null\ncases: {tiny: {}}", grid=GRID, cases=cases).cases) == ["tiny"]
    other = described(tmp_path / "other", "grid: [{x: {}, y: {}}]", grid=GRID, cases=cases)
    assert list(other.cases) == ["x", "y"]


def test_a_null_never_becomes_a_setting():
    assert merge({"a": {"b": 1}}, {"a": {"b": None, "c": 2}, "d": {"e": None, "f": {"g": None}}}) == {
        "a": {"c": 2}, "d": {"f": {}}}
    assert merge({"a": 1}, {"a": {"b": None, "c": 3}}) == {"a": {"c": 3}}
