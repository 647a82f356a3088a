"""What is installed here and whether it works: `python -m libxlstm.doctor`.

Prints versions, hardware and which kernels run on it, and computes each cell forward and backward on every device. Each
problem comes with its mend; the exit status is 1 where there is one. Meant to be pasted whole into a report of a fault.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, library

PACKAGES = {"tokenizers": "tokenizers other than bytes", "matplotlib": "plots", "safetensors": "conversions",
            "pyyaml": "conversions", "lm_eval": "downstream tasks"}
PROGRAMS = ("xlstm-train", "xlstm-generate", "xlstm-eval", "xlstm-data", "xlstm-bench")


class Report:
    def __init__(self):
        self.problems = 0

    def line(self, name, text):
        print(f"{name:12}{text}", flush=True)

    def problem(self, name, text):
        self.problems += 1
        self.line(name, f"PROBLEM: {text}")


def first_line_of(*command):
    """What a program says of itself; None where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def describe_build(report):
    path = library.find("libxlstm_ops.so")
    built = library.build_info(path)
    report.line("libxlstm", f"{__version__}, {path.parent}")
    cuda = f"CUDA kernels by nvcc {built['cuda']}" if built.get("cuda") else "no CUDA kernels"
    report.line("  built", f"with torch {built.get('torch')}, {built.get('compiler')}, {cuda}")
    report.line("torch", f"{torch.__version__}, {Path(torch.__file__).parent}")
    report.line("python", f"{platform.python_version()}, {sys.executable}")
    return built


def describe_machine(report):
    known = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in known if line.startswith("model name")), platform.machine())
    report.line("system", platform.platform())
    report.line("cpu", f"{model}, {torch.get_num_threads()} threads of {len(os.sched_getaffinity(0))} processors, "
                       f"{torch.backends.cpu.get_cpu_capability()}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    report.line("disk", ", ".join(f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder}"
                                  for folder in dict.fromkeys((Path.cwd(), there))))


def describe_gpus(report, built):
    if not torch.cuda.is_available():
        smi = first_line_of("nvidia-smi", "-L")
        if smi is None:
            report.line("gpu", "none")
        elif torch.version.cuda is None:
            report.problem("gpu", f"{smi}: torch is built without CUDA; install one with: https://pytorch.org/get-started")
        else:
            report.problem("gpu", f"{smi}: torch (CUDA {torch.version.cuda}) does not see it; an older driver than that CUDA "
                                  "wants, or CUDA_VISIBLE_DEVICES")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        report.line("gpu", f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB, "
                           f"{card.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}")
        if not built.get("cuda"):
            report.problem("  kernels", "the library has none for CUDA and runs in ATen calls there: install nvcc of CUDA "
                                        f"{torch.version.cuda} and build it again")
        elif card.major < 8:
            report.line("  kernels", "none for compute capabilities below 8.0: ATen calls")
        elif os.environ.get("XLSTM_CUDA_KERNELS") == "off":
            report.line("  kernels", "ATen calls, as XLSTM_CUDA_KERNELS=off says")


def check_programs(report):
    for folder in (Path(__file__).resolve().parent / "bin", Path(__file__).resolve().parents[1] / "build" / "bin"):
        if (folder / PROGRAMS[0]).exists():
            break
    else:
        report.line("programs", "none: the operators alone are built")
        return
    dead = [name for name in PROGRAMS if first_line_of(folder / name, "--help") is None]
    if dead:
        report.problem("programs", f"{', '.join(dead)} in {folder} do not run; start one by hand to see why")
    else:
        report.line("programs", f"in {folder}")


def describe_packages(report):
    found, missing = [], []
    for name, purpose in PACKAGES.items():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} ({purpose})")
    report.line("packages", ", ".join(found) or "none")
    if missing:
        report.line("  missing", f"{', '.join(missing)}")


def mlstm(q, k, v, igate, fgate):
    return torch.ops.xlstm.mlstm_chunkwise(q, k, v, igate, fgate)[0]


def slstm(wx, r, b):
    return torch.ops.xlstm.slstm(wx, r, b)[0]


def sizes_of(cell):
    """Some sizes that take more than one chunk."""
    batch, tokens, heads, qk, v = 2, 150, 2, 32, 64
    if cell is mlstm:
        return [(batch, tokens, heads, width) for width in (qk, qk, v)] + [(batch, tokens, heads)] * 2
    return [(batch, tokens, 4, heads, v), (4, heads, v, v), (4, heads, v)]


def error_of(cell, device, dtype):
    """The largest difference of outputs and gradients from those of float64 on the CPU, of their largest number."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) * 0.1 for size in sizes_of(cell)]
    inputs = [tensor.to(dtype).double() for tensor in inputs]  # both see the same numbers
    results = []
    for where, kind in (("cpu", torch.float64), (device, dtype)):
        leaves = [tensor.detach().to(where, kind).requires_grad_() for tensor in inputs]
        y = cell(*leaves)
        y.backward(torch.cos(torch.arange(y.numel())).to(dtype).to(where, kind).view_as(y))
        results.append([tensor.detach().cpu().double() for tensor in (y, *(leaf.grad for leaf in leaves))])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results))


def check_cells(report):
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    for device in devices:
        for cell in (mlstm, slstm):
            for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
                what = f"{cell.__name__} {str(dtype).removeprefix('torch.')} on {device}"
                try:
                    error = error_of(cell, device, dtype)
                except RuntimeError as raised:
                    report.problem("check", f"{what}: {str(raised).splitlines()[0]}")
                    continue
                if error <= bound:
                    report.line("check", f"{what}: within {error:.1e} of float64, forward and backward")
                else:
                    report.problem("check", f"{what}: {error:.1e} from float64, expected at most {bound:.0e}; the build or the "
                                            "hardware computes wrongly: build again, and report this page if it stays")


def main():
    report = Report()
    built = describe_build(report)
    describe_machine(report)
    describe_gpus(report, built)
    check_programs(report)
    describe_packages(report)
    check_cells(report)
    print("no problem found" if report.problems == 0 else f"problems: {report.problems}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
