"""Runs of a sweep, what is shown of them, and claims, within this process; the trainer is a stand-in."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from toy_sweep import ROOT, edit, toy  # noqa: F401

sys.path.insert(0, str(ROOT / "scripts"))

from sweep import claims, description, execution, machine, progress, sweeps  # noqa: E402


class Run:
    """What the bar sees of a run."""

    failure, stage, total_steps = None, "train", 100

    def __init__(self, experiment, model, at=0, seconds=None, step_flops=1.0):
        self.experiment = SimpleNamespace(name=experiment, measure="loss")
        self.job = SimpleNamespace(case="all", model=model, name=f"all/{model}")
        self.at, self.step_flops = at, step_flops
        self.result = None if seconds is None else {"steps": 100, "seconds": seconds, "diverged": False,
                                                    "measures": {"loss": 2.0}}

    @property
    def done(self):
        return self.result is not None

    def step(self):
        return self.total_steps if self.done else self.at

    def finish(self, seconds):
        self.result = Run("", "", seconds=seconds).result


def test_the_bar_knows_what_steps_cost(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    runs = [Run("small", "a", seconds=10), Run("small", "a"), Run("small", "b"), Run("large", "c"), Run("large", "c")]
    screen = io.StringIO()
    screen.isatty = lambda: True
    bar = progress.Progress(runs, screen)
    assert bar.eta(runs) is None
    now[0] += 20  # 10 s of steps took 20 s of the clock
    runs[1].finish(10)
    assert bar.eta(runs) == pytest.approx(20 + 2 * 20)  # unknown models cost what those of the experiment do, or all
    now[0] += 80
    runs[3].finish(40)
    assert bar.eta(runs) == pytest.approx(100 / 50 * (10 + 40))
    runs[4].at = 25
    now[0] += 20
    bar.update([runs[4]], runs)
    assert "[#############-------]  65% | 3/5 runs | eta 1m20s | large/all/c step 25/100" in screen.getvalue()
    bar.finished(runs[3], runs)
    assert "3/5 large/all/c: loss 2, eta 1m20s" in screen.getvalue()


def test_a_model_that_has_not_run_costs_what_its_operations_do():
    runs = [Run("small", "a", seconds=10, step_flops=1e6), Run("small", "b", step_flops=3e6), Run("other", "c", step_flops=2e6),
            Run("small", "a", at=50, step_flops=1e6), Run("measured", "d", seconds=700, step_flops=None),
            Run("measured", "e", step_flops=None)]
    seconds = progress._costs(runs)
    assert [100 * seconds(run) for run in runs] == pytest.approx([10, 30, 20, 10, 700, 700])


def test_steps_that_a_diverged_run_did_not_make_are_not_counted(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    runs = [Run("toy", "a"), Run("toy", "b")]
    bar = progress.Progress(runs, io.StringIO())
    now[0] += 20
    runs[0].result = {"steps": 20, "seconds": 20, "diverged": True, "measures": {}}
    assert bar.eta(runs) == pytest.approx(100)


def test_without_a_terminal_there_is_a_line_every_ten_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    runs, log = [Run("toy", "a", at=50), Run("toy", "b")], io.StringIO()
    bar = progress.Progress(runs, log)
    for _ in range(25):
        now[0] += 60
        bar.update(runs[:1], runs)
    assert log.getvalue().count("\n") == 2 and " 25% | 0/2 runs | all/a step 50/100\n" in log.getvalue()


class Turn:
    """A run that is done when it has been looked at twice, and tells who else was at work when it started."""

    stage, failure, gpu = "train", None, None

    def __init__(self, name, at_work, alone=False):
        self.name, self.alone, self.at_work, self.looks, self.beside = name, alone, at_work, 0, None

    @property
    def done(self):
        return self.looks == 2

    def start(self):
        self.beside = "".join(run.name for run in self.at_work)
        self.at_work.append(self)

    def poll(self):
        self.looks += 1
        if self.done:
            self.at_work.remove(self)


def test_what_measures_speed_runs_alone():
    at_work = []
    runs = [Turn(name, at_work, name.isupper()) for name in "abCDef"]
    bar = SimpleNamespace(update=lambda *_: None, finished=lambda *_: None, close=lambda: None)
    assert sweeps.execute(runs, 2, bar)
    assert [run.beside for run in runs] == ["", "a", "", "", "", "e"]


def test_runs_take_the_gpus_in_turn():
    at_work = []
    runs = [Turn(name, at_work) for name in "abcd"]
    bar = SimpleNamespace(update=lambda *_: None, finished=lambda *_: None, close=lambda: None)
    assert sweeps.execute(runs, 3, bar, ["5", "7"])
    assert [run.gpu for run in runs] == ["5", "7", "5", "5"]


def test_the_gpus_of_a_machine(monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho $@ >>{asked}\ncase $1 in *index) echo 0; echo 1;; *) echo A GPU;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.visible_gpus() == ["0", "1"] and machine.description({"device": "cuda:1"}) == "A GPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-x,-1,4")
    assert machine.visible_gpus() == ["3", "GPU-x"]
    assert {machine.description({"device": "cuda:1"}), machine.description({"device": "cuda:0"}, "7")} == {"A GPU"}
    assert [line.split("-i ")[1][:5].split()[0] for line in asked.read_text().splitlines()[1:]] == ["1", "GPU-x", "7"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.description({"device": "cuda:0"}) == "cuda:0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.visible_gpus() == []
    for header, threads in (({"device": "cpu", "threads": 1}, "1 thread"), ({"device": "3 threads"}, "3 threads")):
        assert machine.description(header).split(" of ")[0] == threads


def test_how_many_runs_go_at_once(monkeypatch):
    import reproduce

    monkeypatch.setattr(reproduce, "visible_gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr(reproduce.os, "sched_getaffinity", lambda _: set(range(12)))
    jobs_of = lambda *arguments: reproduce.jobs_of(reproduce.parse(["toy", *arguments]))  # noqa: E731
    assert jobs_of() == (1, []) and jobs_of("--mini") == (3, ["0", "1", "2"]) == jobs_of("--jobs", "3")
    assert jobs_of("--mini", "--job", "all/a/x", "--jobs", "4") == (4, [])  # whoever starts it has chosen the GPU
    monkeypatch.setattr(reproduce, "visible_gpus", list)
    assert jobs_of("--mini") == (12, []) and jobs_of("--jobs", "3") == (3, [])


def test_the_programs_of_a_run_see_its_gpu_alone(toy):
    trainer = toy / "bin" / "xlstm-train"
    trainer.write_text(trainer.read_text().replace("import fcntl,", "import os, fcntl,").replace(
        'file.write("x")', 'file.write(os.environ["CUDA_VISIBLE_DEVICES"])'))
    sweep = sweep_of(toy)
    assert sweep.execute(2, progress.Progress(sweep.runs, io.StringIO()), ["5", "7"])
    assert {(run.folder / "starts").read_text() for run in sweep.runs} == {"5", "7"}


def test_two_processes_may_write_a_file_at_once(tmp_path, monkeypatch):
    pids = iter((1, 2))
    monkeypatch.setattr(execution.os, "getpid", lambda: next(pids))
    replace = Path.replace

    def meanwhile(temporary, target):
        monkeypatch.setattr(Path, "replace", replace)
        execution.write_atomically(target, "the other")
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    execution.write_atomically(tmp_path / "table.md", "one")
    assert (tmp_path / "table.md").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def sweep_of(toy):
    return sweeps.Sweep(description.load(toy / "experiments", "toy"), toy / "out" / "toy",
                        execution.Programs(toy / "bin", 1), ["good"])


def run_here(toy):
    sweep = sweep_of(toy)
    assert sweep.execute(1, progress.Progress(sweep.runs, io.StringIO()))
    return sweep.runs


def test_other_settings_begin_anew_even_after_a_failed_start(toy):
    """A start that fails before it trained must not leave the old run under the new configuration."""
    edit(toy, "seeds: [0, 1]", "seeds: [0]")
    edit(toy, "learning_rates: [0.1, 0.2]", "learning_rates: [0.1]")
    (run,) = run_here(toy)
    assert run.result["measures"]["accuracy"] == pytest.approx(0.9)
    trainer = toy / "bin" / "xlstm-train"
    whole = trainer.read_text()
    trainer.write_text("#!/bin/sh\necho xlstm-train: error: no data >&2\nexit 3\n")
    edit(toy, "skill: 1.0", "skill: 0.8")
    assert run_here(toy)[0].failure == "xlstm-train: error: no data"
    trainer.write_text(whole)
    sweep, screen = sweep_of(toy), io.StringIO()
    assert sweep.runs[0].step() == 0  # not the ten of the old run
    progress.Progress(sweep.runs, screen).starting(sweep.runs, 2, ["0", "1"])
    assert screen.getvalue() == "1 run, 1 measured with other settings, to be measured anew; 2 at once on 2 GPUs\n"
    (run,) = run_here(toy)
    assert run.result["measures"]["accuracy"] == pytest.approx(0.7) and (run.folder / "starts").read_text() == "x"
    assert (run.folder.with_name(f"{run.folder.name}.old-1") / "starts").read_text() == "x"


def test_an_unfinished_run_goes_on_where_its_folder_was_moved(toy):
    edit(toy, "seeds: [0, 1]", "seeds: [0]")
    edit(toy, "learning_rates: [0.1, 0.2]", "learning_rates: [0.1]")
    (run,) = run_here(toy)
    run.result_path.unlink()
    moved = run.config.read_text().replace(f"out_dir: {toy}/out", "out_dir: /somewhere")
    assert moved != run.config.read_text()
    run.config.write_text(moved)
    assert sweep_of(toy).runs[0].step() == 10
    assert run_here(toy)[0].result["measures"] == run.result["measures"]
    sweep, screen = sweep_of(toy), io.StringIO()
    progress.Progress(sweep.runs, screen).starting(sweep.runs, 1, [])
    assert screen.getvalue() == "1 run, 1 finished already; 1 at once\n"
    assert (run.folder / "starts").read_text() == "xx" and run.config.read_text() == run.config_text


def test_a_program_that_leaves_nonsense_fails_its_run_alone(toy):
    edit(toy, "seeds: [0, 1]", "seeds: [0]")
    trainer = toy / "bin" / "xlstm-train"
    trainer.write_text(trainer.read_text().replace('json.dumps({"parameters": 1234})',
                                                   'json.dumps({} if "lr0.1" in str(run) else {"parameters": 1234})'))
    broken, whole = run_here(toy)
    assert "cannot be read (KeyError('parameters'))" in broken.failure and whole.result is not None
    trainer.write_text("#!/bin/sh\nkill -9 $$\n")
    assert "xlstm-train was killed by signal 9, as when memory runs out, see" in run_here(toy)[0].failure
    trainer.unlink()
    assert "xlstm-train" in run_here(toy)[0].failure


def test_a_last_evaluation_without_a_number_is_divergence(toy):
    """Not the result of the evaluation before it."""
    edit(toy, "seeds: [0, 1]", "seeds: [0]")
    trainer = toy / "bin" / "xlstm-train"
    trainer.write_text(trainer.read_text().replace('"val/accuracy": accuracy',
                                                   '"val/loss": None if step == 10 else 1.0, "val/accuracy": accuracy'))
    assert [run.result["diverged"] for run in run_here(toy)] == [True, True]
    records = [{"step": 1, "val/loss": 2.0, "val/ppl": 7.4}, {"step": 2, "val/loss": 800.0, "val/ppl": None}, {"step": 3}]
    assert execution.last_evaluation(records) == {"loss": 800.0, "ppl": None}
    assert execution.measures_of(sweep_of(toy).experiment, records) == {"loss": 800.0, "steps_to_half": float("inf")}


def test_a_trainer_that_is_asked_to_stop_with_the_sweep_has_not_failed(toy):
    trainer = toy / "bin" / "xlstm-train"
    trainer.write_text("#!/bin/sh\nkill -TERM $PPID\nexit 75\n")
    sweep = sweep_of(toy)
    screen = io.StringIO()
    assert not sweep.execute(1, progress.Progress(sweep.runs, screen))
    assert not any(run.done for run in sweep.runs)
    assert "asked to stop; waiting until saved: all/good/lr0.1_seed0" in screen.getvalue()


def test_a_sweep_at_work_is_not_put_aside(toy):
    at_work = sweeps.SweepFolder(toy / "out" / "toy")
    at_work.open(resume=False, fresh=False)
    (toy / "out" / "toy" / "all").mkdir()
    with pytest.raises(execution.SweepError, match="another reproduce.py is at work there"):
        sweeps.SweepFolder(toy / "out" / "toy").open(resume=False, fresh=True)
    assert (toy / "out" / "toy" / "all").exists()
    at_work._lock.close()
    sweeps.SweepFolder(toy / "out" / "toy").open(resume=False, fresh=True)
    assert not (toy / "out" / "toy" / "all").exists() and (toy / "out" / "toy.old-1" / "all").exists()


def test_expressions():
    lookup = {("a", "x"): 2.0, ("a", "ctx8.ppl"): 3.0}
    value = lambda text: claims.evaluate(text, lambda *name: lookup[name])  # noqa: E731
    assert value("a.ctx8.ppl / a.x") == 1.5 and value("1 < a.x <= 2 and not a.x > 2") and value("min(a.x, 1) == 1")
    assert not value("1 < a.x < 2") and not value("2 < a.x < 3")
    lookup |= {("a", "never"): float("inf"), ("a", "none"): 0.0}
    assert value("a.never > a.x") and not value("a.never >= 2 * a.never") and not value("a.never == a.never")
    assert value("a.x / a.none > 1") and not value("a.none / a.none < 1") and not value("a.none / a.none >= 1")
    for text in ("__import__('os')", "a.x.real()", "[a.x]", "a", "a.x <", "abs(a.x, 2)", "min(a.x)", "max(a.x, 2, key=abs)",
                 "a.x if a.x else 1", "(lambda: a.x)()", "f'{a.x}'", "'text'", "a.x ** 9", "a.x[0]", 3):
        with pytest.raises(claims.ClaimError):
            value(text)
