"""Training and measuring the runs of a sweep, several at a time, such that killing it at any moment loses little.

<out>/<experiment>/<case>/<model>/<run>.yaml is the configuration, <run>/ the trainer's folder, <run>.log what the programs
printed, and <run>.result.json, written last by a rename, what was measured: a run that has one is finished. One without
is handed to the trainer again, which goes on from its newest checkpoint; where the settings are others by now, its folder is
first put aside as <run>.old-N.
"""

import ctypes
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from . import machine

RESULT_VERSION = 1
DIVERGED = 5  # xlstm-train: a loss or gradient is not finite
NEIGHBOUR_FAILED = 6  # xlstm-train: another of its processes ended
ASKED_TO_STOP = 75  # a program, and reproduce.py: the next start goes on
PR_SET_PDEATHSIG = 1
DYING_SECONDS = 30
METRICS = ("loss", "ppl", "bits_per_byte", "accuracy", "scaled_accuracy", "last_error")


class SweepError(Exception):
    pass


def die_with(parent):
    """A killed sweep leaves no trainer behind that the next one would meet in the same folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


def wait_until_free(path):
    """Whether nobody holds the lock of a run's folder any more: a trainer that was killed while the disk was writing lives a
    little on."""
    deadline = time.monotonic() + DYING_SECONDS
    while path.exists():
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
    return True


def holds_anything(folder):
    """Something beside the file that tells who is at work there."""
    return folder.exists() and any(path.name != "lock" for path in folder.iterdir())


def put_aside(folder):
    """Renames it to NAME.old-N."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)


def write_atomically(path, text):
    """Also where another process, as --collect beside a sweep, writes the same file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_records(path):
    """Records of a metrics.jsonl; a line that a crash tore is left out."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def held_out(records):
    """metric -> {step: value} of the held-out evaluations; a step evaluated twice counts once, the last time."""
    series = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("val/") and _finite(value):
                series.setdefault(key.removeprefix("val/"), {})[record["step"]] = value
    return series


def last_evaluation(records, at=None):
    """metric -> value of the last held-out evaluation, or of that at a step; None where it is not finite; {} without one."""
    last = next((record for record in reversed(records) if any(key.startswith("val/") for key in record)
                 and at in (None, record["step"])), {})
    return {key.removeprefix("val/"): value if _finite(value) else None
            for key, value in last.items() if key.startswith("val/")}


def training_seconds(records):
    """Sum of the steps' times as logged; unlike the wall clock, it does not depend on when the sweep was killed."""
    times = {record["step"]: record["perf/step_ms"] for record in records if record.get("perf/step_ms")}
    seconds = last = 0
    for step, milliseconds in sorted(times.items()):
        seconds += (step - last) * milliseconds / 1e3
        last = step
    return seconds


def measures_of(experiment, records):
    """The held-out metrics at the end or where the description has them read, and the first steps at which they were as good
    as it asks."""
    measures = {metric: value for metric, value in last_evaluation(records, experiment.measure_at).items() if value is not None}
    series = held_out(records)
    for name, goal in experiment.reach.items():
        steps = [s for s, value in series.get(goal["metric"], {}).items() if value >= goal["at_least"]]
        measures[name] = min(steps) if steps else math.inf
    return measures


def reported(report, inside=False):
    """Numbers of a program's --json: its metrics, and all that its groups hold as <group>.<metric>."""
    found = {}
    for key, value in report.items():
        name = "ppl" if key == "perplexity" else key
        if isinstance(value, dict):
            found.update({f"{name}.{inner}": number for inner, number in reported(value, True).items()})
        elif (inside or name in METRICS) and _finite(value):
            found[name] = value
    return found


def fingerprint(experiment, job):
    """Of all that a result depends on; the folder may be moved."""
    told = [RESULT_VERSION, yaml.safe_dump(experiment.settings(job, located=False)), experiment.evaluations,
            experiment.reach]
    if experiment.measure_at is not None:
        told.append(experiment.measure_at)
    if experiment.evaluate_best:
        told.append("evaluate_best")
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def trainer_status(status, log):
    """What the trainer ended with where torchrun, which has a status of its own, tells those of the processes: the first that
    is not that of one whose neighbour failed."""
    told = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", log)] if status != 0 else []
    return next((code for code in told if code not in (0, NEIGHBOUR_FAILED)), status)


class Programs:
    def __init__(self, folder, threads, processes=1):
        self.folder, self.threads, self.processes = Path(folder), threads, processes

    def path(self, name):
        return self.folder / name

    def trainer(self):
        """The command that trains, by as many processes as wanted."""
        started = [] if self.processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc-per-node", str(self.processes), "--no-python"]
        return [*started, str(self.path("xlstm-train"))]

    def check(self, experiment):
        names = {options.get("program", "xlstm-eval") for options in experiment.evaluations.values()}
        for program in map(self.path, sorted(names | ({"xlstm-train"} if experiment.trains else set()))):
            if not os.access(program, os.X_OK):
                raise SweepError(f"{program} is not there; build it (./scripts/train.sh, or cmake --build build), "
                                 "or name its folder with --bin")


class Run:
    """One job, from nothing or from where it was left to its result."""

    def __init__(self, experiment, job, folder, programs):
        self.experiment, self.job, self.programs = experiment, job, programs
        base = folder / job.name
        self.folder = base
        self.config, self.log, self.result_path = (base.with_name(base.name + end)
                                                   for end in (".yaml", ".log", ".result.json"))
        self.gpu = None  # the one it is to use; None: whichever its programs choose
        self.total_steps = experiment.steps(job) if experiment.trains else 1
        self.step_flops = None  # of a training step, once it is planned
        self.alone = not experiment.trains  # its evaluations, all it has, measure speed
        self.failure = self.process = self.stage = self.left_at = None
        self.diverged = False
        settings = experiment.settings(job)
        settings["run"] = {**settings.get("run", {}), "name": base.name, "out_dir": str(base.parent)}
        self.config_text = yaml.safe_dump(settings, sort_keys=False)
        self.fingerprint = fingerprint(experiment, job)
        found = self._read_result()
        self.outdated = found is not None and found.get("fingerprint") != self.fingerprint
        self.result = None if self.outdated else found

    def _read_result(self):
        try:
            return json.loads(self.result_path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None

    @property
    def done(self):
        return self.result is not None or self.failure is not None

    def records(self):
        return read_records(self.folder / "metrics.jsonl")

    def step(self):
        """The step it is at; until it is started, the one it was left at, which is looked up once."""
        if self.result is not None:
            return self.total_steps
        if self.stage is not None:
            return self._last_step()
        if self.left_at is None:
            self.left_at = self._last_step() if self._configured_alike() else 0
        return self.left_at

    def _last_step(self):
        """From the tail of its metrics."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                tail = file.read().decode(errors="replace").splitlines()
        except OSError:
            return 0
        for line in reversed(tail):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
        return 0

    def _train_command(self):
        return [*self.programs.trainer(), str(self.config), f"run.num_threads={self.programs.threads}"]

    def checkpoint(self):
        """What the evaluations judge: the run, which stands for its newest checkpoint, or the link of ckpt.keep_best."""
        return self.folder / "ckpt" / "best" if self.experiment.evaluate_best else self.folder

    def _evaluation_path(self, name):
        return self.folder / f"evaluation-{name}.json"

    def _evaluate_command(self, name):
        options = dict(self.experiment.evaluations[name])
        program = options.pop("program", "xlstm-eval")
        command = [str(self.programs.path(program)), "--json", str(self._evaluation_path(name))]
        if program == "xlstm-eval":
            command += [str(self.checkpoint()), "--threads", str(self.programs.threads)]
        else:
            command += [str(self.config), f"run.num_threads={self.programs.threads}"]
        for option, value in options.items():
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            command += ["--" + option.replace("_", "-"), text]
        return command

    def _attempt(self, action):
        """A run that cannot go on is a failure among others: the sweep does the rest."""
        try:
            action()
        except (OSError, SweepError) as error:
            self.failure = str(error)
        except (KeyError, ValueError) as error:
            self.failure = f"what the programs left cannot be read ({error!r}), see {self.log}"

    def start(self):
        self._attempt(self._start)

    def _start(self):
        self.config.parent.mkdir(parents=True, exist_ok=True)
        if not wait_until_free(self.folder / "lock"):
            raise SweepError(f"{self.folder}: another program is at work there")
        # Before the new configuration is written: a kill in between must not leave the one beside what the other one trained.
        if self.experiment.trains and holds_anything(self.folder) and not self._configured_alike():
            put_aside(self.folder)
        write_atomically(self.config, self.config_text)
        self.log.unlink(missing_ok=True)
        if not self.experiment.trains:
            self.folder.mkdir(exist_ok=True)
        self.stages = iter((["train"] if self.experiment.trains else []) + [*self.experiment.evaluations])
        self._next()

    def _configured_alike(self):
        """Whether the configuration beside the run's folder is this one, wherever the folder was then."""
        def settings(text):
            told = yaml.safe_load(text)
            return {**told, "run": {**told["run"], "out_dir": None}}

        try:
            return settings(self.config.read_text(encoding="utf-8")) == settings(self.config_text)
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return False

    def _next(self):
        self.stage = next(self.stages, None)
        if self.stage is None:
            self._finish()
            return
        command = self._train_command() if self.stage == "train" else self._evaluate_command(self.stage)
        environment = {"XLSTM_PYTHON": sys.executable, **os.environ}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with open(self.log, "a", encoding="utf-8") as log:
            log.write("$ " + " ".join(command) + "\n")
            log.flush()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            start_new_session=True, preexec_fn=functools.partial(die_with, os.getpid()),
                                            env=environment)

    def poll(self):
        """Goes on to the next program where one has ended."""
        status = self.process.poll() if self.process is not None else None
        if status is not None:
            self.process = None
            self._attempt(functools.partial(self._ended, status))

    def _ended(self, status):
        if self.stage == "train" and self.programs.processes > 1:
            status = trainer_status(status, self.log.read_text(encoding="utf-8", errors="replace"))
        if self.stage == "train" and (status == DIVERGED or status == 0 and self._ended_without_a_number()):
            self.diverged = True
            self._finish()
        elif status == 0:
            self._next()
        else:
            self.failure = self._describe_failure(status)

    def _ended_without_a_number(self):
        last = last_evaluation(self.records(), self.experiment.measure_at)
        return None in (last.get("loss", 0), last.get(self.experiment.measure, 0))

    def _describe_failure(self, status):
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        error = next((line for line in reversed(lines) if "error:" in line), None)
        program = self.experiment.evaluations.get(self.stage, {}).get("program", "xlstm-eval")
        how = (f"was killed by signal {-status}{', as when memory runs out' if -status == signal.SIGKILL else ''}" if status < 0
               else "was asked to stop" if status == ASKED_TO_STOP else f"ended with status {status}")
        return error or f"{'xlstm-train' if self.stage == 'train' else program} {how}, see {self.log}"

    def _finish(self):
        """Reads what was measured and marks the run as finished."""
        records = self.records()
        measures, header, seconds = {}, {}, 0.0
        if not self.diverged:
            measures = measures_of(self.experiment, records)
            for name in self.experiment.evaluations:
                header = json.loads(self._evaluation_path(name).read_text(encoding="utf-8"))
                seconds += header.get("seconds", 0)
                measures.update({f"{name}.{key}": value for key, value in reported(header).items()})
            for measure in (self.experiment.measure, self.experiment.chosen_by):
                if measure not in measures:
                    self.failure = f"measured no {measure}, see {self.log}"
                    return
        if self.experiment.trains:
            header, seconds = json.loads((self.folder / "run.json").read_text(encoding="utf-8")), training_seconds(records)
        result = {"fingerprint": self.fingerprint, "diverged": self.diverged, "parameters": header["parameters"],
                  "steps": max((r["step"] for r in records), default=0), "seconds": seconds,
                  "machine": machine.description(header, self.gpu), "measures": measures}
        write_atomically(self.result_path, json.dumps(result, indent=1) + "\n")
        self.result = result

    def terminate(self):
        if self.process is not None:
            self.process.terminate()  # the trainer saves

    def wait(self):
        if self.process is not None:
            self.process.wait()
