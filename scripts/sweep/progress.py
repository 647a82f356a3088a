"""The bar over a sweep, on standard error: redrawn on a terminal, else a line for every finished run and every ten minutes."""

import shutil
import sys
import time

REDRAW_SECONDS = 0.5
LINE_SECONDS = 600  # where there is no terminal
BAR_WIDTH = 20


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _count(number, what):
    return f"{number} {what}{'s' if number != 1 else ''}"


def _costs(runs):
    """Function of a run: seconds per step, as far as finished runs tell; until one has, its operations alone count."""
    known = {}
    for run in runs:
        steps = run.result and (run.result["steps"] or run.total_steps)  # a run that only measures counts as one step
        if steps and run.result["seconds"]:
            cost, experiment = run.result["seconds"] / steps, run.experiment.name
            known.setdefault((experiment, run.job.case, run.job.model), []).append(cost)
            for key in (experiment, None) if run.step_flops else (experiment,):
                known.setdefault(key, []).append(cost / (run.step_flops or 1.0))
    means = {key: sum(costs) / len(costs) for key, costs in known.items()}

    def cost(run):
        own = means.get((run.experiment.name, run.job.case, run.job.model))
        if own is not None:
            return own
        rate = means.get(run.experiment.name, means.get(None, 1.0) if run.step_flops else 1.0)
        return rate * (run.step_flops or 1.0)

    return cost


def _steps_made(run):
    """Those of a diverged run end before its last one."""
    return run.result["steps"] if run.result is not None and run.result["diverged"] else run.step()


class Progress:
    def __init__(self, runs, stream=None):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.start = self.drawn = time.monotonic()
        self.steps_before = {id(run): _steps_made(run) for run in runs}
        self.several = len({run.experiment.name for run in runs}) > 1

    def _name(self, run):
        return f"{run.experiment.name}/{run.job.name}" if self.several else run.job.name

    def eta(self, runs):
        """Seconds to go; None: unknown yet.

        Steps cost what those of the same model did in finished runs, else by their operations at the mean rate of the
        experiment's models, else of all; how the sweep so far compares with that, evaluations and runs beside each other
        included, goes for the rest too."""
        costs = _costs(runs)
        here = [(run, _steps_made(run) - self.steps_before[id(run)]) for run in runs if run.failure is None]
        expected = sum(max(0, steps) * costs(run) for run, steps in here)  # less than 0: it began anew
        elapsed = time.monotonic() - self.start
        if expected <= 0 or elapsed <= 0:
            return None
        to_go = sum((run.total_steps - run.step()) * costs(run) for run in runs if not run.done)
        return to_go * elapsed / expected

    def _line(self, active, runs):
        total = sum(run.total_steps for run in runs)
        at = sum(min(run.step(), run.total_steps) if run.failure is None else run.total_steps for run in runs)
        share = at / total if total else 1.0
        filled = int(share * BAR_WIDTH)
        seconds = self.eta(runs)
        eta = f" | eta {duration(seconds)}" if seconds is not None else ""
        now = "; ".join(f"{self._name(run)} {self._stage(run)}" for run in active)
        return (f"[{'#' * filled}{'-' * (BAR_WIDTH - filled)}] {100 * share:3.0f}% | "
                f"{sum(run.done for run in runs)}/{len(runs)} runs{eta} | {now}")

    @staticmethod
    def _stage(run):
        return f"step {run.step()}/{run.total_steps}" if run.stage == "train" else f"evaluation {run.stage}"

    def starting(self, runs, jobs, gpus):
        counts = [_count(len(runs), "run"), *(f"{count} {what}" for count, what in (
            (sum(run.done for run in runs), "finished already"),
            (sum(run.outdated for run in runs), "measured with other settings, to be measured anew")) if count)]
        self._print(f"{', '.join(counts)}; {jobs} at once{' on ' + _count(len(gpus), 'GPU') if gpus else ''}")

    def update(self, active, runs):
        now = time.monotonic()
        if not active or now - self.drawn < (REDRAW_SECONDS if self.terminal else LINE_SECONDS):
            return
        self.drawn = now
        line = self._line(active, runs)
        if self.terminal:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)

    def stopping(self, active):
        names = ", ".join(map(self._name, active))
        self._print(f"asked to stop; waiting until saved: {names}" if active else "asked to stop")

    def _print(self, text):
        print(("\r\033[K" if self.terminal else "") + text, file=self.stream, flush=True)

    def finished(self, run, runs):
        if run.failure is not None:
            what = f"failed: {run.failure}"
        elif run.result["diverged"]:
            what = f"diverged at step {run.result['steps']}"
        else:
            what = f"{run.experiment.measure} {run.result['measures'][run.experiment.measure]:.4g}"
        seconds = self.eta(runs)
        eta = f", eta {duration(seconds)}" if seconds is not None and not all(r.done for r in runs) else ""
        self._print(f"{sum(r.done for r in runs)}/{len(runs)} {self._name(run)}: {what}{eta}")

    def close(self):
        if self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)
