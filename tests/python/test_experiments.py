"""The descriptions in scripts/reproduce: what they say is what the trainer takes, with the paper's parameter counts."""

import functools
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "reproduce"
TRAINER = ROOT / "build" / "bin" / "xlstm-train"
sys.path.insert(0, str(ROOT / "scripts"))

from sweep import description, dry_run, execution  # noqa: E402
from sweep.describe import describe  # noqa: E402
from sweep.description import DescriptionError, Experiment, Job  # noqa: E402
from sweep.execution import Programs, SweepError, reported  # noqa: E402
from sweep.progress import Progress  # noqa: E402
from sweep.report import table_text  # noqa: E402
from sweep.results import SETTINGS_LETTERS, Results, Row  # noqa: E402
from sweep.sweeps import Sweep  # noqa: E402

# Millions, from the paper's tables 1, 2, 7 and 8: {experiment: {case: {model: number}}}; whole numbers are all it tells.
SIZES_1300 = {"xlstm_1_0": 1422.6, "xlstm_7_1": 1420.1, "llama": 1420.4, "mamba": 1475.3, "rwkv4": 1515.2}
TABLE_7 = {
    "m125": {"xlstm_1_0": 163.8, "xlstm_7_1": 163.7, "llama": 162.2, "mamba": 167.8, "rwkv4": 169.4},
    "m350": {"xlstm_1_0": 409.3, "xlstm_7_1": 408.4, "llama": 406.6, "mamba": 423.1, "rwkv4": 430.5},
    "m760": {"xlstm_1_0": 840.4, "xlstm_7_1": 839.7, "llama": 834.1, "mamba": 870.5, "rwkv4": 891.0},
    "m1300": SIZES_1300,
    "m2700": {"xlstm_1_0": 2788.3, "llama": 2779.5, "mamba": 2897.2, "rwkv4": 2984.8}}
TABLE_7_AT_15_B = {  # further models there
    "m125": {"rwkv5": 176.5, "rwkv6": 173.6, "hgrn2": 162.2}, "m760": {"rwkv5": 947.8, "rwkv6": 907.7, "hgrn2": 834.2},
    "m1300": {"rwkv5": 1616.0, "rwkv6": 1537.5, "hgrn2": 1439.4}, "m2700": {"rwkv5": 3194.7, "rwkv6": 3021.9, "hgrn2": 2795.4}}
PAPER_SIZES = {
    "ablation_architecture": {"all": {"lstm": 607.8, "lstm_residual": 506.1, "lstm_block": 505.9, "xlstm_0_1": 427.3,
                                      "xlstm_7_1": 408.4}},
    "ablation_gating": {"all": {"xlstm_1_0": 409.3}},
    "ablation_block": {"all": {"xlstm_1_0": 409.3, "no_convolution": 408.8, "post_up_projection": 430.4}},
    "slimpajama15b": {**{case: {**sizes, **TABLE_7_AT_15_B.get(case, {})} for case, sizes in TABLE_7.items()},
                      "m350": {m: TABLE_7["m350"][m] for m in ("llama", "mamba")},
                      "table_1": {**TABLE_7["m350"], "gpt": 355.9, "rwkv5": 455.7, "rwkv6": 441.6, "hgrn2": 411.4, "h3": 420,
                                  "hyena": 435, "retnet": 431, "hgrn": 411, "gla": 412}},
    "scaling300b": {case: TABLE_7[case] for case in ("m125", "m350", "m760", "m1300")},
    "length_extrapolation": {"all": SIZES_1300},
    "generation": {"all": SIZES_1300},
    "rare_tokens": {"all": {}},
}


DESCRIPTIONS = [(name, mini) for name in description.experiment_ids(EXPERIMENTS) for mini in (False, True)
                if not mini or (EXPERIMENTS / name / "mini.yaml").exists()]
needs_trainer = pytest.mark.skipif(not TRAINER.exists(), reason="build/bin/xlstm-train is not built")


@functools.cache
def dry_rows(name, mini):
    """(experiment, its rows): the trainer is asked once for all tests, and refuses what it would not train."""
    experiment = description.load(EXPERIMENTS, name, mini)
    return experiment, dry_run.rows(experiment, Programs(TRAINER.parent, 1))


@needs_trainer
@pytest.mark.parametrize("name, mini", DESCRIPTIONS)
def test_the_trainer_takes_a_job_of_every_case_and_model(name, mini):
    """Where a row cannot be run anywhere, it may have no numbers; files may be missing."""
    experiment, rows = dry_rows(name, mini)
    assert [(row.case, row.model) for row in rows] == [
        (case, model) for case in experiment.cases for model in experiment.models_of(case)]
    possible = [row for row in rows if not experiment.needs_of(row.case, row.model, elsewhere=True)]
    assert possible and all(row.needs for row in rows if row not in possible)
    for row in possible:
        job = Job(row.case, row.model, 1.0, 0)
        assert row.parameters > 0 and row.weights > 0 and (row.activations is None or row.activations > 0), row
        if experiment.trains:
            assert row.steps == experiment.steps(job) > 0, row
            assert row.tokens == experiment.steps(job) * experiment.tokens_per_step(job) > 0, row
        else:
            assert row.steps is None and row.tokens is None


@needs_trainer
@pytest.mark.parametrize("spoilt, message", [
    ({"train": {"global_batch_size": 16, "micro_batch_size": 32}}, "train.micro_batch_size: is 32, expected a divisor of"),
    ({"data": {"task": {"name": "parity"}, "text": "x"}}, "data.task.name: is given together with data.text"),
    ({"optim": {"warmup_steps": 21}}, "optim.warmup_steps: is 21, expected at most the 20 steps"),
    ({"optim": {"schedule": "linear", "restarts": 3}}, "optim.restarts: applies to optim.schedule cosine only"),
    ({"model": {"kind": "llama", "slstm_at": [0]}}, "model.slstm_at: applies to model.kind xlstm only"),
])
def test_a_job_that_would_not_train_is_named(spoilt, message):
    good = {"data": {"task": {"name": "parity"}}, "train": {"max_steps": 20}, "optim": {"warmup_steps": 1}}
    with pytest.raises(SweepError, match=f"spoilt.yaml:.*{re.escape(message)}"):
        describe(TRAINER, {"good": good, "spoilt": description.merge(good, spoilt)})


@needs_trainer
@pytest.mark.parametrize("experiment", sorted(PAPER_SIZES))
def test_full_size_models_have_the_papers_parameter_counts(experiment):
    found = {(row.case, row.model): row.parameters for row in dry_rows(experiment, False)[1]}
    for (case, model), parameters in found.items():
        millions = parameters / 1e6
        size = PAPER_SIZES[experiment].get(case, {}).get(model, millions)
        near = 0.5 if isinstance(size, int) else 0.1
        assert abs(millions - size) <= near, f"{case} {model}: {millions} M, expected {size} M"
    missing = {(c, m) for c, models in PAPER_SIZES[experiment].items() for m in models} - set(found)
    assert not missing


MOST_GIB = 72  # of a card of 80 GB; the rest is for the CUDA context, the libraries and gaps between blocks


@needs_trainer
@pytest.mark.parametrize("name", description.experiment_ids(EXPERIMENTS))
def test_full_rows_fit_a_card_of_80_gb(name):
    """By the estimate, which counts no gaps; or the row says what it needs wherever it is run."""
    experiment, rows = dry_rows(name, False)
    found = {(row.case, row.model): (row.weights + (row.activations or 0)) / dry_run.GIB for row in rows
             if not experiment.needs_of(row.case, row.model, elsewhere=True)}
    assert found and {pair: gib for pair, gib in found.items() if gib > MOST_GIB} == {}


def write(folder, **content):
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"title": "Toy", "source": "nowhere", **content}, sort_keys=False))
    return folder


TOY = {"base": {"train": {"max_steps": 10}}, "models": {"a": {}}, "learning_rates": [0.1], "measure": "ppl"}


def toy(folder, **content):
    return Experiment(write(folder / "toy", **{**TOY, **content}))


def test_a_model_with_cases_takes_part_in_those_alone(tmp_path):
    experiment = toy(tmp_path, cases={"small": {"config": {"model": {"embedding_dim": 8}}}, "large": {}}, models={
        "a": {"config": {"model": {"kind": "x"}}},
        "b": {"cases": {"large": {"config": {"model": {"num_blocks": 3}}, "learning_rates": [0.3]}}},
        "c": {"cases": {"small": {"needs": "time"}}}})
    assert [(j.case, j.model, j.learning_rate) for j in experiment.jobs()] == [
        ("small", "a", 0.1), ("large", "a", 0.1), ("large", "b", 0.3)]
    assert experiment.settings(experiment.jobs()[2])["model"] == {"num_blocks": 3}
    assert experiment.models_of("small") == ["a", "c"] and experiment.needs_of("small", "c") == "time"


def test_the_nearest_learning_rates_count_and_seeds_draw_samples_of_their_own(tmp_path):
    experiment = toy(tmp_path, seeds=[0, 1], cases={"small": {"learning_rates": [0.2]}, "large": {}}, models={
        "a": {}, "b": {"learning_rates": [0.3]}, "c": {"learning_rates": [0.3], "cases": {"small": {"learning_rates": [0.4]}}}})
    rates = {(case, model): experiment.rates(case, model) for case in experiment.cases for model in experiment.models_of(case)}
    assert rates == {("small", "a"): [0.2], ("small", "b"): [0.3], ("small", "c"): [0.4], ("large", "a"): [0.1],
                     ("large", "b"): [0.3]}
    settings = [experiment.settings(Job("small", "a", 0.2, seed)) for seed in (0, 1)]
    assert len({each["data"]["shuffle_seed"] for each in settings}) == len({each["run"]["seed"] for each in settings}) == 2


def test_tokens_that_fill_no_whole_step_take_one(tmp_path):
    train = {"max_tokens": 101, "global_batch_size": 5}
    experiment = toy(tmp_path, base={"train": train, "data": {"seq_len": 4}})
    assert experiment.steps(experiment.jobs()[0]) == 6


def test_what_an_experiment_needs(tmp_path, monkeypatch):
    """Files and a GPU: nothing is run without them, but counted elsewhere; a miniature that needs nothing has none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    needy = {"needs": "text and a GPU", "files": [str(tmp_path / "a"), "{here}/b"], "gpu": True,
             "models": {"a": {}, "b": {"needs": "time"}}}
    folder = tmp_path / "toy"
    assert toy(tmp_path, **needy).needs_of("all", "b") == "time"
    for name in ("a", "toy/b"):
        experiment = Experiment(folder)
        assert experiment.needs_of("all", "a") == "text and a GPU" and experiment.jobs() == []
        (job,) = experiment.jobs(elsewhere=True)
        assert Results(experiment, []).missing_reason("all", job.model) == "not run: needs text and a GPU"
        assert Results(experiment, [Row(job, "diverged")]).missing_reason("all", "a") == "diverged at every learning rate"
        (tmp_path / name).touch()
    assert Experiment(folder).needs_of("all", "a") == "text and a GPU; no GPU is seen here"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert Experiment(folder).needs_of("all", "a") == "" and len(Experiment(folder).jobs()) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (folder / "mini.yaml").write_text('needs: ""')
    assert [job.model for job in Experiment(folder, mini=True).jobs()] == ["a"]


def test_full_sizes_of_language_models_need_files_and_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    without = {name for name in PAPER_SIZES if not description.load(EXPERIMENTS, name).jobs()}
    assert without == set(PAPER_SIZES) - {"generation"}
    for text in ("slimpajama", "wikitext103"):
        (tmp_path / "data" / text).mkdir(parents=True)
        for part in ("train", "validation", "test"):
            (tmp_path / "data" / text / f"{part}.bin").touch()
    (tmp_path / "data" / "gpt2").mkdir()
    assert all(description.load(EXPERIMENTS, name).jobs() for name in PAPER_SIZES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not any(description.load(EXPERIMENTS, name).jobs() for name in PAPER_SIZES)
    assert all(description.load(EXPERIMENTS, name, mini=True).jobs() for name in description.experiment_ids(EXPERIMENTS))


def measured_at(step, every=5, steps=10):
    return {"base": {"train": {"max_steps": steps}, "eval": {"every": every}}, "measure_at": step}


def test_metrics_are_read_at_the_step_that_the_description_tells(tmp_path):
    experiment = toy(tmp_path, **measured_at(5))
    records = [{"step": 5, "val/loss": 3.0, "val/ppl": 20.1}, {"step": 6, "train/loss": 1.0}, {"step": 10, "val/ppl": 7.4}]
    assert execution.measures_of(experiment, records) == {"loss": 3.0, "ppl": 20.1}
    assert execution.measures_of(experiment, records[1:]) == {}
    job = experiment.jobs()[0]
    others = [Experiment(write(tmp_path / name, base=experiment.base, models={"a": {}}, learning_rates=[0.1], measure="ppl",
                               **content)) for name, content in (("last", {}), ("end", {"measure_at": 10}))]
    assert execution.measures_of(others[0], records) == {"ppl": 7.4}
    assert len({execution.fingerprint(each, job) for each in (experiment, *others)}) == 3
    assert "Held-out metrics are those of step 5." in table_text(Results(experiment, []))


def test_a_goal_is_reached_where_the_metric_is_as_good_as_asked(tmp_path):
    goal = {"soon": {"metric": "accuracy", "at_least": 0.5}}
    experiment, plain = toy(tmp_path, reach=goal), Experiment(write(tmp_path / "plain", **TOY))
    records = [{"step": step, "val/accuracy": value} for step, value in ((5, 0.4), (10, 0.5), (15, 0.3), (20, 0.7))]
    assert execution.measures_of(experiment, records)["soon"] == 10
    assert execution.measures_of(experiment, records[:1])["soon"] == float("inf")
    job = experiment.jobs()[0]
    assert execution.fingerprint(experiment, job) != execution.fingerprint(plain, job)


def rows_of(experiment, measured):
    """A Row per job: measured[learning rate][seed] is its ppl, or its status."""
    rows = []
    for job in experiment.jobs():
        told = measured[job.learning_rate][job.seed]
        rows.append(Row(job, told) if isinstance(told, str) else Row(job, "done", measures={"ppl": told}))
    return rows


@pytest.mark.parametrize("better, measured, best", [
    ("lower", {0.1: [2, 3, 10], 0.2: [4, 4, 4]}, 0.2),  # by the mean, not by the median
    ("higher", {0.1: [2, 3, 10], 0.2: [4, 4, 4]}, 0.1),
    ("lower", {0.1: [1, 1, "diverged"], 0.2: [4, 4, 4]}, 0.2),
    ("lower", {0.1: [1, 1, "unfinished"], 0.2: [4, "failed", 4]}, None)])
def test_the_best_learning_rate(tmp_path, better, measured, best):
    experiment = toy(tmp_path, learning_rates=[0.1, 0.2], seeds=[0, 1, 2], better=better)
    found = Results(experiment, rows_of(experiment, measured)).best("all", "a")
    assert {row.job.learning_rate for row in found} == ({best} if best else set()) and len(found) == (3 if best else 0)


def test_claims_that_cannot_be_judged_are_wrong_but_for_models_left_out(tmp_path):
    claims = [{"text": "good", "expect": "a.ppl < 5", "asserted": True}, {"text": "said", "expect": "a.ppl < 1"}]
    experiment = toy(tmp_path, claims=claims)
    measured = Row(experiment.jobs()[0], "done", measures={"ppl": 4.0})
    assert Results(experiment, [measured]).wrong() == []
    assert [verdict.claim["text"] for verdict in Results(experiment, []).wrong()] == ["good"]
    assert Results(experiment, [], models=["b"]).wrong() == []


def test_rows_of_other_settings_are_stale_if_they_diverged_too(tmp_path):
    experiment = toy(tmp_path)
    job, now = experiment.jobs()[0], execution.fingerprint(experiment, experiment.jobs()[0])[:SETTINGS_LETTERS]
    for status, settings, stale in (("done", "x", 1), ("diverged", "x", 1), ("failed", "x", 0), ("diverged", now, 0)):
        assert len(Results(experiment, [Row(job, status, settings=settings)]).stale()) == stale, status


KEPT = {"base": {"train": {"max_steps": 30}, "eval": {"every": 10}, "ckpt": {"every": 5, "keep_best": True}},
        "evaluations": {"test": {"seq_len": 8}}, "measure": "test.ppl"}


def test_the_checkpoint_that_was_best_is_evaluated(tmp_path):
    """The trainer's own, which knows what a run that fell back has judged anew."""
    (tmp_path / "best").mkdir()
    run, last = (execution.Run(each, each.jobs()[0], tmp_path / "out", Programs(tmp_path, 1)) for each in (
        toy(tmp_path / "best", **KEPT, evaluate_best=True), toy(tmp_path, **KEPT)))
    assert run.checkpoint() == run.folder / "ckpt" / "best" and last.checkpoint() == last.folder
    assert str(run.checkpoint()) in run._evaluate_command("test")
    assert run.fingerprint != last.fingerprint
    assert "each run's checkpoint of the lowest held-out loss." in table_text(Results(run.experiment, []))


def test_rare_tokens_are_counted_where_the_validation_is_best():
    """The paper stops early; the miniature ends with its last step."""
    assert [description.load(EXPERIMENTS, "rare_tokens", mini).evaluate_best for mini in (False, True)] == [True, False]


def test_the_learning_rate_is_chosen_by_what_is_held_out_for_it(tmp_path):
    experiment = toy(tmp_path, learning_rates=[0.1, 0.2, 0.3], evaluations={"test": {"seq_len": 8}}, measure="test.accuracy",
                     chosen_by="accuracy")
    rows = [Row(job, "done", parameters=7, steps=10, seconds=1.0, measures={"accuracy": validation, "test.accuracy": test})
            for job, validation, test in zip(experiment.jobs(), (0.8, 0.7, 0.6), (0.4, 0.5, 0.9))]
    results = Results(experiment, rows)
    assert results.best("all", "a") == rows[:1]
    text = table_text(results)
    assert "| a | 7 | 0.1 |  | 0.4 |" in text and "chosen by accuracy, not by test.accuracy." in text
    del rows[0].measures["accuracy"]
    assert results.best("all", "a") == rows[1:2]


def test_tables_1_2_and_8_are_read_after_an_epoch():
    """At 28,170 steps of 256 sequences, as the paper's, and the miniatures at their end."""
    for name in ("slimpajama15b", "ablation_architecture", "ablation_gating", "ablation_block"):
        assert description.load(EXPERIMENTS, name).measure_at == 28_170
    assert not any(description.load(EXPERIMENTS, name, mini).measure_at for name, mini in DESCRIPTIONS if mini)


def test_the_last_rate_follows_the_first_and_here_is_the_descriptions_folder(tmp_path):
    experiment = toy(tmp_path, decay_to=0.1, learning_rates=[0.1, 0.4],
                     base={"data": {"val": "{here}/x", "train": [{"path": "{here}"}]}})
    rates = [experiment.settings(job)["optim"] for job in experiment.jobs()]
    assert [rate["learning_rate"] for rate in rates] == [0.1, 0.4]
    assert [rate["min_lr"] for rate in rates] == pytest.approx([0.01, 0.04])
    job = experiment.jobs()[0]
    assert experiment.settings(job)["data"]["val"] == f"{tmp_path / 'toy'}/x"
    assert experiment.settings(job)["data"]["train"] == [{"path": str(tmp_path / "toy")}]
    assert experiment.settings(job, located=False)["data"]["val"] == "{here}/x"


def test_a_miniature_without_a_case_has_no_model_in_it(tmp_path):
    folder = write(tmp_path / "toy", base={"train": {"max_steps": 1}}, cases={"small": {}, "large": {}}, learning_rates=[0.1],
                   measure="ppl", models={"a": {"cases": {"small": {}, "large": {}}}, "b": {"cases": {"large": {}}}})
    (folder / "mini.yaml").write_text("cases: {large: null}")
    mini = Experiment(folder, mini=True)
    assert [(job.case, job.model) for job in mini.jobs()] == [("small", "a")]


@pytest.mark.parametrize("content, message", [
    ({"models": {"a": {"cases": {"none": {}}}}}, "there is no case none"),
    ({"models": {"a": {"cases": {"all": {"lr": 1}}}}}, "models.a.cases.all: unknown key"),
    ({"cases": {"all": {"files": "x"}}}, "cases.all: files, but no needs to say what they are"),
    ({"evaluations": {"e": {"program": "xlstm-data"}}}, "program xlstm-data"),
    ({"trains": False, "evaluations": {"e": {"seq_len": 8}}}, "xlstm-eval needs a trained model"),
    ({"trains": False}, "evaluations is missing"),
    ({"claims": [{"text": "t", "expect": "b.ppl < 1"}]}, "claim t: there is no model"),
    ({"files": ["x"]}, "files or gpu, but no needs"),
    ({"gpu": True}, "files or gpu, but no needs"),
    (measured_at(7), "measure_at: all.a is evaluated every 5 of 10 steps, not at 7"),
    (measured_at(15), "evaluated every 5 of 10 steps, not at 15"),
    ({**measured_at(5), "evaluations": {"e": {}}, "measure": "e.ppl"}, "measure_at: e.ppl is not measured while it trains"),
    ({**KEPT, "evaluate_best": "ppl"}, "evaluate_best: expected true or false, got ppl"),
    ({**KEPT, "evaluate_best": True, "evaluations": {}, "measure": "ppl"}, "evaluate_best: no evaluation is by xlstm-eval"),
    ({**KEPT, "evaluate_best": True, "base": {"eval": {"every": 8}}},
     r"evaluate_best: the best checkpoint of all.a is not kept \(ckpt.keep_best\)"),
    ({"chosen_by": "test.ppl"}, "nothing measures test.ppl"),
])
def test_descriptions_that_do_not_fit_are_refused(content, message, tmp_path):
    with pytest.raises(DescriptionError, match=message):
        toy(tmp_path, **content)


def test_groups_of_a_report_are_measures():
    report = {"loss": 1.0, "perplexity": 2.7, "seconds": 9.0, "tokens": 5, "data": "x",
              "frequency": {"count_10": {"perplexity": 4.0, "tokens": 3}}}
    assert reported(report) == {"loss": 1.0, "ppl": 2.7, "frequency.count_10.ppl": 4.0, "frequency.count_10.tokens": 3}


BENCH = """#!{python}
import json, sys, yaml
assert sys.argv[1] == "--json" and sys.argv[-2:] == ["--batches", "1,8"], sys.argv
seed = yaml.safe_load(open(sys.argv[3]))["run"]["seed"]
json.dump({{"parameters": 77, "seconds": 2.5, "throughput": {{"max": 10.0 + seed}}}}, open(sys.argv[2], "w"))
"""


def test_an_experiment_that_only_measures(tmp_path):
    experiment = toy(tmp_path, trains=False, learning_rates=None, seeds=[0, 1], measure="speed.throughput.max",
                     evaluations={"speed": {"program": "xlstm-bench", "batches": [1, 8]}})
    assert "optim" not in experiment.settings(experiment.jobs()[0])
    program = tmp_path / "xlstm-bench"
    program.write_text(BENCH.format(python=sys.executable))
    program.chmod(0o755)
    programs = Programs(tmp_path, 1)
    programs.check(experiment)
    sweep = Sweep(experiment, tmp_path / "out", programs)
    assert sweep.execute(1, Progress(sweep.runs))
    assert [run.failure for run in sweep.runs] == [None, None]
    assert "| a | 77 |  |  | 10.5 (10 to 11) |" in table_text(Results.of_sweep(sweep))
    assert json.loads(sweep.runs[1].result_path.read_text())["seconds"] == 2.5
