"""Timing. CPU: candidates take turns within one process, so that a slow moment of the machine hits all of them. GPU: one
candidate at a time, many calls between two events."""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
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


def write_report(path, report: dict) -> None:
    """As JSON, at once or not at all. Benchmarks write after each case: one that is stopped keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


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


# ---- GPU -----------------------------------------------------------------------------------------------------------


def gpu_machine(device: torch.device) -> dict:
    """What the numbers were measured on; clocks and power are read, never set."""
    info = machine()
    if device.type != "cuda":
        return info | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    info |= {"device": properties.name, "multiprocessors": properties.multi_processor_count,
             "memory_gib": round(properties.total_memory / 2**30, 1), "l2_mib": properties.L2_cache_size / 2**20,
             "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    return info | clocks()


def clocks() -> dict:
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu"]
    try:
        line = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(","))))


@dataclass
class Effort:
    """How long to measure: a sample is one graph of `calls` calls, or one eager call."""

    warm_up: int = 25
    calls: int = 10
    samples: int = 20
    seconds: float = 1.0  # no further sample after that, but at least 5


def measure(prepare, device: torch.device, effort: Effort, graph: bool = True) -> dict:
    """Times one candidate. `prepare()` returns callables, one per input set, which take turns.

    Returns {"median_ms", "quartiles_ms", "calls", "method", "extra_bytes"}; extra_bytes is the most memory that one call
    takes beyond what was allocated before. On a GPU the calls are captured in a CUDA graph; where that fails the calls
    are timed eagerly and "method" says so. graph=False: eagerly, for what breaks the stream when it is captured.
    """
    if device.type != "cuda":
        return _measure_eagerly(prepare(), effort, _cpu_samples) | {"extra_bytes": None}
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = prepare()
        calls[0]()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        calls[0]()
        torch.cuda.synchronize(device)
        extra = torch.cuda.max_memory_allocated(device) - before
        result = (_measure_graph(calls, stream, effort) if graph else None) or _measure_eagerly(
            calls, effort, _event_samples)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    return result | {"extra_bytes": extra}


def _measure_graph(calls, stream, effort):
    """None where the calls cannot be captured."""
    _warm_up(calls, effort)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    # Slow calls: fewer of them in a graph, but every input set once.
    count = max(len(calls), min(effort.calls, int(0.05 / (time.perf_counter() - begin)) + 1))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    end = time.perf_counter() + effort.seconds
    while len(samples) < 5 or (len(samples) < effort.samples and time.perf_counter() < end):
        begin_event.record(stream)
        graph.replay()
        end_event.record(stream)
        end_event.synchronize()
        samples.append(begin_event.elapsed_time(end_event) / count)
    return _summary(samples, f"CUDA graph of {count} calls", count * len(samples))


def _warm_up(calls, effort):
    end = time.perf_counter() + max(1.0, effort.seconds)
    for i in range(effort.warm_up):
        calls[i % len(calls)]()
        if i % 5 == 4 and torch.cuda.is_available():
            torch.cuda.synchronize()
        if time.perf_counter() > end:
            break


def _measure_eagerly(calls, effort, sample):
    _warm_up(calls, effort)
    samples = []
    end = time.perf_counter() + effort.seconds
    while len(samples) < 5 or (len(samples) < 5 * effort.samples and time.perf_counter() < end):
        samples.append(sample(calls[len(samples) % len(calls)]))
    return _summary(samples, "eager calls", len(samples))


def _event_samples(call):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _cpu_samples(call):
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _summary(samples, method, calls):
    low, _, high = statistics.quantiles(samples, n=4)
    return {"median_ms": statistics.median(samples), "quartiles_ms": [low, high], "calls": calls, "method": method}


def kernel_times(call) -> dict:
    """Kernel -> milliseconds on the GPU within one call; empty where the profiler cannot be used."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        averages = profiler.key_averages()
    except RuntimeError:
        return {}
    return {a.key: a.self_device_time_total / 1e3 for a in averages if a.device_type == DeviceType.CUDA}


def rooflines(device: torch.device, effort: Effort, tiny: bool = False) -> dict:
    """Bandwidth of a large copy, counting bytes read and written, and the rate of a bfloat16 product of random numbers."""
    size, edge = (2**20, 128) if tiny else (2**30, 8192)
    source = torch.randint(256, (4 * size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: [lambda: target.copy_(source)], device, effort)
    del source, target
    sets = [[torch.randn(edge, edge, dtype=torch.bfloat16, device=device) for _ in range(2)] for _ in range(3)]
    product = measure(lambda: [lambda a=a, b=b: a @ b for a, b in sets], device, effort)
    return {"copy": copy | {"bytes": 8 * size, "gb_per_s": 8 * size / copy["median_ms"] / 1e6},
            "product": product | {"edge": edge, "tflop_per_s": 2 * edge**3 / product["median_ms"] / 1e9}}
