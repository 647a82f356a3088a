"""Paired timing: candidates take turns within one process, so that a slow moment of the machine hits all of them."""

import gc
import os
import platform
import statistics
import time
from datetime import date

import torch


def machine() -> dict:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": date.today().isoformat(),
        "cpu": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def race(candidates: dict, seconds: float, min_rounds: int = 5) -> dict:
    """Times each callable once per round until `seconds` have gone by (at least min_rounds rounds).

    Returns name -> {"median_ms", "min_ms", "rounds"}. One untimed call each warms up caches and allocators.
    """
    for run in candidates.values():
        run()
    times = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < min_rounds or time.perf_counter() < end:
            for name, run in candidates.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
            rounds += 1
    finally:
        gc.enable()
    return {
        name: {"median_ms": 1e3 * statistics.median(t), "min_ms": 1e3 * min(t), "rounds": len(t)}
        for name, t in times.items()
    }
