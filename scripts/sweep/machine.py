"""The machine that runs are measured on: its GPUs, which runs share, and what it is called in a table."""

import os
import platform
import subprocess
from pathlib import Path


def _nvidia_smi(*arguments):
    """Lines that it prints; none where it or a GPU is missing."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments, "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in done.stdout.splitlines()]


def _named_gpus():
    """The names in CUDA_VISIBLE_DEVICES, as CUDA reads it: up to the first that is none; None if it is not set."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names = []
    for name in filter(None, map(str.strip, text.split(","))):
        if name.startswith("-"):
            break
        names.append(name)
    return names


def visible_gpus():
    """Names that CUDA_VISIBLE_DEVICES takes, one for each GPU; [] without any."""
    named = _named_gpus()
    return _nvidia_smi("--query-gpu=index") if named is None else named


def least_used(gpus, runs):
    """The GPU that the fewest of the runs are on; None without GPUs."""
    return min(gpus, key=lambda gpu: sum(run.gpu == gpu for run in runs), default=None)


def description(header, gpu=None):
    """What a run.json or a program's report says of where it ran: a GPU's name, or threads and processor.

    gpu: the only one that the program saw, None if it saw what this process does."""
    device = str(header.get("device", ""))
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        seen = [gpu] if gpu is not None else _named_gpus()
        name = seen[index] if seen and index < len(seen) else str(index)
        return next(iter(_nvidia_smi("--query-gpu=name", "-i", name)), device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.machine())  # not named there on aarch64
    count = header.get("threads") or (int(device.split()[0]) if device.endswith(" threads") else 0)  # xlstm-bench: "2 threads"
    threads = f"{count} thread{'s' if count != 1 else ''}" if count else ""
    return " of ".join(part for part in (threads, processor) if part)
