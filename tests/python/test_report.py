"""Figures, table and page of scripts/reproduce.py, from made-up results."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "reproduce.py"
sys.path.insert(0, str(ROOT / "scripts"))

from sweep import drawing, figures, page  # noqa: E402
from sweep.description import DescriptionError, Experiment, Job, load  # noqa: E402
from sweep.execution import fingerprint  # noqa: E402
from sweep.report import notes  # noqa: E402
from sweep.results import Results, Row, csv_text, curves_text  # noqa: E402

DESCRIPTION = {
    "title": "Recall & <more>", "source": "figure 5", "about": "Made up.", "needs": "a GPU day",
    "base": {"train": {"max_steps": 20, "global_batch_size": 4}, "data": {"seq_len": 8}, "model": {"num_blocks": 2}},
    "cases": {f"t{t}_d{d}": {"label": f"T {t}, d {d}", "config": {"data": {"seq_len": t}, "model": {"embedding_dim": d}}}
              for t in (64, 128) for d in (32, 64)},
    "models": {"xlstm": {"label": "xLSTM[1:0]", "config": {"model": {"kind": "xlstm"}}},
               "llama": {"config": {"model": {"kind": "llama"}}}, "later": {"needs": "a kernel"}},
    "learning_rates": [0.1, 0.01], "seeds": [0, 1], "measure": "accuracy", "columns": ["short.ppl"],
    "evaluations": {"short": {"seq_len": 8}, "long": {"seq_len": 32}},
    "paper": {"t64_d32": {"xlstm": 0.9}, "t64_d64": {"xlstm": 1.0}},
    "claims": [{"text": "xLSTM recalls", "case": "t64_d32", "paper": "figure 5", "asserted": True,
                "expect": "xlstm.accuracy > llama.accuracy"},
               {"text": "Llama too", "case": "t64_d32", "expect": "llama.accuracy > 0.99"},
               {"text": "Others", "case": "t64_d32", "expect": "later.accuracy > 0"}],
    "figures": {
        "width": {"kind": "lines", "x": "model.embedding_dim", "panels": "data.seq_len", "log": "x", "title": "Recall"},
        "rates": {"kind": "lines", "x": "learning_rate", "panels": "cases", "log": "x"},
        "lengths": {"kind": "lines", "x": "evaluation.seq_len", "y": "ppl", "cases": ["t64_d32"]},
        "courses": {"kind": "lines", "x": "tokens", "y": "loss", "cases": ["t64_d32"]},
        "sizes": {"kind": "lines", "x": "parameters", "panels": "data.seq_len"},
        "all_of_it": {"kind": "heatmap"},
        "bars": {"kind": "bars", "models": ["llama", "xlstm"]},
        "buckets": {"kind": "bars", "y": {"short": "short.ppl", "long": "long.ppl"}, "panels": "cases"},
        "both": {"kind": "bars", "x": "models", "series": "models", "panels": ["data.seq_len", "model.embedding_dim"]},
    },
}


def describe(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump({**DESCRIPTION, **changes}, sort_keys=False))
    return Experiment(folder)


def accuracy(job):
    width = float(job.case.split("_d")[1])
    return (0.9 if job.model == "xlstm" else 0.5) - 1 / width - job.learning_rate / 10 + job.seed / 1000


def made_up(experiment, diverged=()):
    rows = []
    for job in experiment.jobs():
        value = accuracy(job)
        status = "diverged" if (job.case, job.model) in diverged else "done"
        rows.append(Row(job, status, "", 1000 * int(job.case.split("_d")[1]), 20, 1.5, "2 threads of a machine",
                        fingerprint(experiment, job)[:12],
                        {"accuracy": value, "short.ppl": 2 / value, "long.ppl": 3 / value, "first_good": float("inf"),
                         "short.tokens": 1991}
                        if status == "done" else {},
                        {"loss": {10: 1.0 + job.seed, 20: 0.5 + job.seed}, "accuracy": {20: value}}))
    return Results(experiment, rows)


@pytest.fixture
def results(tmp_path):
    return made_up(describe(tmp_path / "experiments" / "recall"))


def resolved(results, name):
    return figures.resolve(results, name, results.experiment.figures[name])


def series(figure, panel=0):
    return {s.label: [(p.x, p.value) for p in s.points] for s in figure.panels[panel].series}


def test_lines_along_a_setting_and_the_papers_values(results):
    figure = resolved(results, "width")
    assert [panel.label for panel in figure.panels] == ["seq len 64", "seq len 128"]
    best = {"xLSTM[1:0]": 0.9, "llama": 0.5}
    for label, top in best.items():
        assert series(figure)[label] == [(d, pytest.approx(top - 1 / d - 0.001 + 0.0005)) for d in (32, 64)]
    xlstm = figure.panels[0].series[0]
    assert xlstm.paper == [(32, 0.9), (64, 1.0)] and figure.panels[1].series[0].paper == []
    assert xlstm.points[0].high - xlstm.points[0].low == pytest.approx(0.001)  # of the seeds


def test_a_panel_for_each_combination_of_settings(results):
    figure = resolved(results, "both")
    assert [panel.label for panel in figure.panels] == [
        f"seq len {t}, embedding dim {d}" for t in (64, 128) for d in (32, 64)]
    assert series(figure, 1)["llama"] == [("llama", pytest.approx(0.5 - 1 / 64 - 0.0005))]


def test_every_learning_rate(results):
    figure = resolved(results, "rates")
    assert len(figure.panels) == 4
    assert series(figure)["llama"] == [(0.01, pytest.approx(0.46825)), (0.1, pytest.approx(0.45925))]


def test_lengths_courses_sizes_and_buckets(results):
    rows = results.best("t64_d32", "llama")
    short, long = (results.mean(rows, name) for name in ("short.ppl", "long.ppl"))
    assert series(resolved(results, "lengths"))["llama"] == [(8, short), (32, long)]
    assert series(resolved(results, "courses"))["llama"] == [(10 * 4 * 64, 1.5), (20 * 4 * 64, 1.0)]
    assert [x for x, _ in series(resolved(results, "sizes"))["llama"]] == [32000, 64000]
    assert series(resolved(results, "buckets"))["llama"] == [("short", short), ("long", long)]
    assert list(series(resolved(results, "bars"))) == ["xLSTM[1:0]", "llama"]
    assert len(series(resolved(results, "all_of_it"))["llama"]) == 4


def test_the_papers_value_stands_where_its_measure_does(tmp_path):
    experiment = describe(tmp_path / "recall", measure="long.ppl", paper={"t64_d32": {"llama": 7.5}})
    results = made_up(experiment)
    assert resolved(results, "lengths").panels[0].series[1].paper == [(32, 7.5)]
    assert resolved(results, "buckets").panels[0].series[1].paper == [("long", 7.5)]
    assert not any(s.paper for name in ("courses", "rates") for p in resolved(results, name).panels for s in p.series)


def test_what_was_not_measured_is_left_out(tmp_path):
    results = made_up(describe(tmp_path / "recall"), diverged={("t64_d32", "llama")})
    assert series(resolved(results, "width"))["llama"] == [(64, pytest.approx(0.4834 + 0.0005, abs=1e-3))]
    assert "llama" not in series(resolved(results, "courses"))
    never = figures.resolve(results, "n", {"kind": "bars", "y": "first_good"})
    assert never.panels == [] or all(not s.points for p in never.panels for s in p.series)


@pytest.mark.parametrize("figure, message", [
    ({"kind": "pie"}, "kind is one of bars, heatmap, lines"),
    ({"kind": "bars", "why": 1}, "unknown key why"),
    ({"kind": "bars", "x": "sizes"}, "x: sizes is neither a setting nor one of"),
    ({"kind": "bars", "panels": ["data.seq_len", "sizes"]}, "neither a setting nor one of models, cases"),
    ({"kind": "bars", "series": ["data.seq_len"]}, "series: ['data.seq_len'] is neither a setting nor one of"),
    ({"kind": "bars", "models": ["gpt"]}, "there is no gpt"),
    ({"kind": "lines", "x": "cases"}, "lines want numbers along x"),
    ({"kind": "lines", "x": "model.kind", "panels": "cases"}, "lines want numbers along x, model.kind is xlstm"),
    ({"kind": "lines", "x": "measures", "y": {"a": "m"}}, "lines want numbers along x"),
    ({"kind": "bars", "x": "measures", "y": "accuracy"}, "go together"),
    ({"kind": "lines", "x": "model.embedding_dim"}, "t64_d32.xlstm and t128_d32.xlstm fall on the same place"),
    ({"kind": "bars", "log": "z"}, "log is x, y or xy"),
])
def test_figures_that_cannot_be_drawn_are_refused(figure, message, tmp_path):
    with pytest.raises(DescriptionError, match=re.escape(message)):
        describe(tmp_path / "recall", figures={"f": figure})


def test_without_a_figure_in_the_description_there_are_bars_of_the_measure(tmp_path):
    content = {key: value for key, value in DESCRIPTION.items() if key != "figures"}
    folder = tmp_path / "recall"
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    assert Experiment(folder).figures == {"accuracy": {"kind": "bars"}}


def test_bars_of_a_single_case_stand_by_model(tmp_path):
    experiment = describe(tmp_path / "recall", cases={"t64_d32": DESCRIPTION["cases"]["t64_d32"]}, paper={},
                          figures={"f": {"kind": "bars"}, "g": {"kind": "bars", "series": "models"}})
    results = made_up(experiment)
    assert [x for x, _ in series(resolved(results, "f"))["T 64, d 32"]] == ["xLSTM[1:0]", "llama"]
    assert list(series(resolved(results, "g"))) == ["xLSTM[1:0]", "llama"]


def test_files_hold_everything(results, tmp_path):
    (tmp_path / "results.csv").write_text(csv_text(results))
    (tmp_path / "curves.csv").write_text(curves_text(results))
    again = Results.read(results.experiment, tmp_path)
    assert again.rows == results.rows and again.models is None and again.stale() == []
    assert csv_text(again) == csv_text(results) and curves_text(again) == curves_text(results)


def test_drawings_are_the_same_every_time_and_name_everything(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = drawing.draw(results, tmp_path)
    assert [path.stem for path in paths] == list(DESCRIPTION["figures"])
    first = [path.read_text() for path in paths]
    assert [path.read_text() for path in drawing.draw(results, tmp_path)] == first
    for text in first:
        assert text.startswith("<?xml") and "xLSTM[1:0]" in text and "llama" in text
    assert "paper" in first[0] and "Recall" in first[0] and ">64<" in first[0]
    assert ">0.88<" in first[5]  # the heatmap's cells tell their values


def test_a_figure_that_fails_costs_nothing_else(results, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    whole = drawing.svg_text
    monkeypatch.setattr(drawing, "svg_text", lambda figure: whole(figure) if figure.name != "rates" else 1 / 0)
    assert {path.stem for path in drawing.draw(results, tmp_path)} == set(DESCRIPTION["figures"]) - {"rates"}
    assert "figure rates could not be drawn: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bars", "heatmap", "lines"])
def test_plots_of_which_only_the_paper_has_values(kind, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = {"kind": kind, "panels": "data.seq_len", "x": "model.embedding_dim"}
    results = made_up(describe(tmp_path / "recall", figures={"f": figure}))
    results.rows = [row for row in results.rows if row.job.case.startswith("t128")]
    assert len(drawing.draw(results, tmp_path)) == 1 and capsys.readouterr().err == ""


def report(experiments, *folders, into=None, environment=None):
    command = [sys.executable, str(SCRIPT), "--experiments", str(experiments), "--report", *map(str, folders)]
    return subprocess.run(command + (["--into", str(into)] if into else []), capture_output=True, text=True, timeout=120,
                          env=environment)


def leave(results, folder):
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text(csv_text(results))
    (folder / "curves.csv").write_text(curves_text(results))


def test_the_page_stands_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    leave(results, tmp_path / "out" / "recall")
    done = report(tmp_path / "experiments", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "url(" not in page and "@import" not in page
    assert "Recall &amp; &lt;more&gt;" in page and "Recall & <" not in page and "figure 5" in page
    for text in ("holds", "does not hold", "could not be judged: no later.accuracy", "not run: needs a kernel", "a GPU day",
                 "xlstm.accuracy 0.8682, llama.accuracy 0.4682", "1 of 1", "48s", "2 threads of a machine"):
        assert text in page, text
    images = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert len(images) == len(DESCRIPTION["figures"])
    assert base64.b64decode(images[0]).decode() == (tmp_path / "out" / "recall" / "width.svg").read_text()
    table = (tmp_path / "out" / "recall" / "table.md").read_text()
    assert "![width](width.svg)" in table
    assert re.search(r"\| xLSTM\[1:0\] \| 32,000 \| 0.01 \| 0.9 \| 0.8682 \(0.867\d+ to 0.868\d+\) \| -0.03175 \|", table)


def test_a_page_of_parts_run_alone(results, tmp_path):
    leave(results, tmp_path / "there" / "recall")
    describe(tmp_path / "experiments" / "recall", figures={})
    other = made_up(describe(tmp_path / "experiments" / "second", title="Second", figures={}))
    leave(other, tmp_path / "elsewhere" / "second")
    done = report(tmp_path / "experiments", tmp_path / "there" / "recall", into=tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    done = report(tmp_path / "experiments", tmp_path / "elsewhere", into=tmp_path / "kept")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "kept" / "report.html")
    page = (tmp_path / "kept" / "report.html").read_text()
    assert 'id="recall"' in page and 'id="second"' in page and page.count("no results here") == 0
    describe(tmp_path / "experiments" / "third", title="Third")
    report(tmp_path / "experiments", tmp_path / "kept")
    page = (tmp_path / "kept" / "report.html").read_text()
    assert "Third" in page and "no results here; the full size needs a GPU day" in page
    assert (tmp_path / "kept" / "second" / "table.md").exists()
    done = report(tmp_path / "experiments", tmp_path / "nowhere")
    assert done.returncode == 2 and "there is no results.csv" in done.stderr


def test_copied_results_are_those_of_one_sweep(results, tmp_path):
    leave(results, tmp_path / "out" / "recall")
    describe(tmp_path / "experiments" / "recall", figures={})
    page.rebuild([tmp_path / "out"], tmp_path / "experiments", tmp_path / "kept")
    page.rebuild([tmp_path / "kept"], tmp_path / "experiments", tmp_path / "kept")  # onto itself
    for name in ("results.csv", "curves.csv"):
        assert (tmp_path / "kept" / "recall" / name).read_bytes() == (tmp_path / "out" / "recall" / name).read_bytes()
    (tmp_path / "out" / "recall" / "curves.csv").unlink()
    _, (again,) = page.rebuild([tmp_path / "out"], tmp_path / "experiments", tmp_path / "kept")
    assert not any(row.curves for row in again.rows) and not (tmp_path / "kept" / "recall" / "curves.csv").exists()
    edited = tmp_path / "kept" / "recall" / "results.csv"
    edited.write_text(edited.read_text().replace(",0,done", ",zero,done", 1))
    with pytest.raises(DescriptionError, match="results.csv: invalid literal .*zero"):
        page.rebuild([tmp_path / "kept"], tmp_path / "experiments")


def test_a_report_can_be_checked(results, tmp_path):
    leave(results, tmp_path / "out" / "recall")
    for experiments, status in ((tmp_path / "experiments", 0), (tmp_path / "others", 1)):
        describe(experiments / "recall", figures={}, claims=[
            {"text": "xLSTM recalls", "case": "t64_d32", "asserted": True,
             "expect": f"xlstm.accuracy > llama.accuracy + {0.9 * status}"}])
        command = [sys.executable, str(SCRIPT), "--experiments", str(experiments), "--report", str(tmp_path / "out"), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and ("recall does not hold: xLSTM recalls" in done.stderr) == bool(status)


def test_what_is_not_finished_is_told(results):
    results.rows[0].status, results.rows[1].status = "failed", "unfinished"
    assert any("2 of 32 runs are not finished, 1 of them failed: learning rates that lack one are left out." == text
               for text in notes(results))
    held = Results(results.experiment, [row for row in results.rows if row.job.model == "xlstm"], ["xlstm"])
    assert "0 of 1" in page.page_text([(held, [])])  # left out by --only does not hold, though it fails no check
    assert held.wrong() == []


def test_columns_without_a_value_are_left_out_of_the_page_alone(results, tmp_path):
    leave(results, tmp_path / "out" / "recall")
    for paper, columns in ((DESCRIPTION["paper"], 2), ({}, 0)):
        describe(tmp_path / "experiments" / "recall", paper=paper, figures={})
        assert report(tmp_path / "experiments", tmp_path / "out").returncode == 0
        assert (tmp_path / "out" / "report.html").read_text().count("<th>paper: accuracy</th>") == columns
        assert (tmp_path / "out" / "recall" / "table.md").read_text().count("| paper: accuracy |") == 4


def test_results_of_other_settings_are_told_apart(results, tmp_path):
    leave(results, tmp_path / "out" / "recall")
    describe(tmp_path / "experiments" / "recall", figures={}, learning_rates=[0.1],
             base={**DESCRIPTION["base"], "train": {"max_steps": 9}})
    assert report(tmp_path / "experiments", tmp_path / "out").returncode == 0
    assert "32 of 32 runs were made with other settings" in (tmp_path / "out" / "recall" / "table.md").read_text()


def test_without_matplotlib_table_and_page_come_out(results, tmp_path):
    leave(results, tmp_path / "out" / "recall")
    (tmp_path / "hidden" / "sitecustomize.py").parent.mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n")
    done = report(tmp_path / "experiments", tmp_path / "out", environment={"PYTHONPATH": str(tmp_path / "hidden")})
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "xlstm.accuracy 0.8682" in page and "data:image" not in page
    assert not list((tmp_path / "out" / "recall").glob("*.svg"))


def test_descriptions_of_the_project_have_figures_that_can_be_drawn():
    for folder in (ROOT / "scripts" / "reproduce").glob("*/experiment.yaml"):
        experiment = load(folder.parent.parent, folder.parent.name)
        assert experiment.figures
        job = experiment.jobs(elsewhere=True)[0]
        assert isinstance(job, Job)
        empty = Results(experiment, [])
        for name, figure in experiment.figures.items():
            for panel in figures.resolve(empty, name, figure).panels:
                assert all(not s.points and s.paper for s in panel.series)


@pytest.mark.parametrize("changes, told, chosen", [
    ({}, "Means over seeds 0, 1 at the best learning rate (in", True),
    ({"learning_rates": [0.1], "seeds": [0]}, "One seed, 0, at one learning rate each, not searched;", False),
    ({"learning_rates": [0.1], "models": {"a": {}, "b": {"learning_rates": [0.1, 0.01]}}, "claims": [], "figures": {},
      "paper": {}}, "at the best learning rate of the rows that have several, the others at their only one (in", True),
    ({"chosen_by": "long.accuracy"}, "chosen by long.accuracy, not by accuracy.", False)])
def test_how_learning_rates_were_chosen_is_told(tmp_path, changes, told, chosen):
    text = " ".join(notes(Results(describe(tmp_path / "recall", **changes), [])))
    assert told in text and ("The learning rate is chosen on the samples that are reported." in text) == chosen
