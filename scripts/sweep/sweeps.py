"""Sweeps: all runs of an experiment, several at a time, in a folder that one process owns."""

import fcntl
import signal
import time

from .estimate import costs
from .execution import Run, SweepError, holds_anything, put_aside
from .machine import least_used

POLL_SECONDS = 0.05


def lock(path, shared=False):
    """Holds the file for as long as the process lives and the result is kept; None: another process has it."""
    file = open(path, "w", encoding="utf-8")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return None
    return file


class SweepFolder:
    """<out>/<experiment>: owned by one sweep, or shared by processes that do one of its jobs each."""

    def __init__(self, path):
        self.path = path

    def check(self, resume, fresh):
        if holds_anything(self.path) and not resume and not fresh:
            raise SweepError(f"{self.path} is there already: --resume goes on with it, --fresh starts anew and keeps it "
                             "beside the new one")

    def open(self, resume, fresh):
        self.check(resume, fresh)
        self._own(shared=False)
        if fresh and holds_anything(self.path):
            put_aside(self.path)  # with its lock: until here nobody else is at work there
            self._own(shared=False)

    def share(self):
        self._own(shared=True)

    def _own(self, shared):
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path / "lock", shared)
        if self._lock is None:
            raise SweepError(f"{self.path}: another reproduce.py is at work there")


class Sweep:
    """collect: nothing is to be run; what was run where there are files or a GPU that are missing here belongs to it, too."""

    def __init__(self, experiment, folder, programs, models=None, collect=False):
        self.experiment, self.folder, self.models = experiment, folder, models
        self.programs = programs
        self.runs = [Run(experiment, job, folder, programs) for job in experiment.jobs(models, elsewhere=collect)]
        if collect:
            begun = {(run.job.case, run.job.model) for run in self.runs if run.folder.exists() or run.result}
            self.runs = [run for run in self.runs if (run.job.case, run.job.model) in begun
                         or not experiment.needs_of(run.job.case, run.job.model)]

    def plan(self):
        """What a step of each model costs; settings that the trainer does not take are an error now, not hours later."""
        if not self.experiment.trains or all(run.done for run in self.runs):
            return
        try:
            found = {(cost.case, cost.model): cost.numbers for cost in costs(self.experiment, self.programs, self.models)}
        except SweepError as error:
            raise SweepError(f"{self.experiment.name}: {error}") from error
        for run in self.runs:
            numbers = found[run.job.case, run.job.model]
            run.step_flops = numbers["training_flops"] / max(1, numbers["steps"])

    def execute(self, jobs, progress, gpus=()):
        return execute(self.runs, jobs, progress, gpus)


def _startable(run, active, jobs):
    return len(active) < jobs and not (active and (run.alone or active[0].alone))


def execute(runs, jobs, progress, gpus=(), after=lambda run: None):
    """Runs everything that is not finished, `jobs` at once, each on the least used of the GPUs, and calls after(run) when one
    is; False: asked to stop before."""
    stop = []
    handlers = {number: signal.signal(number, lambda *_: stop.append(True)) for number in (signal.SIGTERM, signal.SIGINT)}
    waiting, active = [run for run in runs if not run.done], []
    try:
        while waiting or active:
            while waiting and _startable(waiting[0], active, jobs):
                run = waiting.pop(0)
                run.gpu = least_used(gpus, active)
                active.append(run)
                run.start()
            time.sleep(POLL_SECONDS)
            if stop:  # before looking at the runs: those that were asked at the same moment have not failed
                progress.stopping(active)
                break
            for run in list(active):
                run.poll()
                if run.done:
                    active.remove(run)
                    progress.finished(run, runs)
                    after(run)
            progress.update(active, runs)
    finally:
        for run in active:
            run.terminate()
        for run in active:
            run.wait()
        progress.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return not (waiting or active)
