"""The bar over a sweep, on standard error: redrawn on a terminal, else a line for every finished run."""

import shutil
import sys
import time

REDRAW_SECONDS = 0.5
BAR_WIDTH = 20


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Progress:
    def __init__(self, runs, stream=None):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.start, self.drawn = time.monotonic(), 0
        self.steps_before = {id(run): run.step() for run in runs}

    def eta(self, runs):
        """Seconds to go: unfinished runs at the speed of their model, other models at the mean speed. None: unknown yet.

        Speeds come from what finished runs cost and, until there are any, from this sweep so far."""
        cost = {}
        for run in runs:
            if run.result is not None and run.result["steps"] and run.result["seconds"]:
                cost.setdefault((run.job.case, run.job.model), []).append(run.result["seconds"] / run.result["steps"])
        here = [run.step() - self.steps_before[id(run)] for run in runs if run.failure is None]
        elapsed = time.monotonic() - self.start
        to_go = [(run, run.total_steps - run.step()) for run in runs if not run.done]
        if sum(here) <= 0 or elapsed <= 0:
            return None
        mean = elapsed / sum(here)
        busy = sum(c for costs in cost.values() for c in costs) / sum(len(c) for c in cost.values()) if cost else None
        seconds = 0.0
        for run, steps in to_go:
            own = cost.get((run.job.case, run.job.model))
            # `mean` is of the wall clock and holds the evaluations and the number of jobs; the models' costs only share it out.
            seconds += steps * mean * (sum(own) / len(own) / busy if own and busy else 1)
        return seconds

    def _line(self, active, runs):
        total = sum(run.total_steps for run in runs)
        at = sum(min(run.step(), run.total_steps) if run.failure is None else run.total_steps for run in runs)
        share = at / total if total else 1.0
        filled = int(share * BAR_WIDTH)
        seconds = self.eta(runs)
        eta = f" | eta {duration(seconds)}" if seconds is not None else ""
        now = "; ".join(f"{run.job.name} {self._stage(run)}" for run in active)
        return (f"[{'#' * filled}{'-' * (BAR_WIDTH - filled)}] {100 * share:3.0f}% | "
                f"{sum(run.done for run in runs)}/{len(runs)} runs{eta} | {now}")

    @staticmethod
    def _stage(run):
        return f"step {run.step()}/{run.total_steps}" if run.stage == "train" else f"evaluation {run.stage}"

    def update(self, active, runs):
        now = time.monotonic()
        if self.terminal and now - self.drawn > REDRAW_SECONDS:
            self.drawn = now
            line = self._line(active, runs)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", file=self.stream, flush=True)

    def finished(self, run, runs):
        if run.failure is not None:
            what = f"failed: {run.failure}"
        elif run.result["diverged"]:
            what = f"diverged at step {run.result['steps']}"
        else:
            what = f"{run.experiment.measure} {run.result['measures'][run.experiment.measure]:.4g}"
        seconds = self.eta(runs)
        eta = f", eta {duration(seconds)}" if seconds is not None and not all(r.done for r in runs) else ""
        clear = "\r\033[K" if self.terminal else ""
        print(f"{clear}{sum(r.done for r in runs)}/{len(runs)} {run.job.name}: {what}{eta}", file=self.stream, flush=True)

    def close(self):
        if self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)
