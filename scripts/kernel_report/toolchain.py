"""nvcc, ptxas and nvdisasm, with what they gave kept between calls."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from .budgets import PORTABLE
from .reading import Kernel, count_instructions, read_report

ROOT = Path(__file__).resolve().parents[2]
CONDITIONAL = {"sm_90a": "compute_90a"}  # targets that have PTX of their own
FLAGS = ["-std=c++17", "-O3", "--threads", "1"]


def find_disassembler(nvcc):
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [Path(nvcc).parent, *site.glob("nvidia/cu*/bin"), site / "triton/backends/nvidia/bin"]
    found = [folder / "nvdisasm" for folder in folders if (folder / "nvdisasm").exists()]
    return str(found[0]) if found else shutil.which("nvdisasm")


def run(command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def digest(*parts):
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:16]


def included_files(source, root, seen=None):
    """The file and what it includes in quotes, from the checked tree or this repository."""
    seen = {} if seen is None else seen
    if source in seen:
        return seen
    seen[source] = source.read_text()
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[source], re.M):
        for folder in (source.parent, root, ROOT):
            if (folder / name).is_file():
                included_files((folder / name).resolve(), root, seen)
                break
    return seen


class Toolchain:
    def __init__(self, cache, root):
        self.nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        if not Path(self.nvcc).exists():
            sys.exit("error: nvcc was not found (PATH, /usr/local/cuda/bin)")
        self.disassembler = find_disassembler(self.nvcc)
        if not self.disassembler:
            sys.exit("error: nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
        self.ptxas = str(Path(self.nvcc).parent / "ptxas")
        self.include = Path(self.nvcc).resolve().parents[1] / "include"
        self.version = re.search(r"V([\d.]+)", run([self.nvcc, "--version"]).stdout)[1]
        listed = run([self.nvcc, "--list-gpu-code"]).stdout.split()
        self.targets = [t for t in listed if int(t.removeprefix("sm_")) >= 80] + list(CONDITIONAL)
        self.root, self.cache = root, cache
        self.stamp = digest(self.version, FLAGS, *(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))),
                            Path(self.disassembler).stat().st_size)
        self.used = set()
        cache.mkdir(parents=True, exist_ok=True)

    def compile(self, source):
        """-> (object of the host code, {PTX architecture: file}, error)"""
        files = included_files(source.resolve(), self.root)
        folder = self.cache / f"{source.stem}-{digest(self.stamp, *sorted(map(str, files)), *files.values())}"
        self.used.add(folder)
        if not folder.exists():
            making = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            codes = [f"-gencode=arch={ptx},code={ptx}" for ptx in ("compute_80", *CONDITIONAL.values())]
            done = run([self.nvcc, *FLAGS, *codes, f"-I{self.root}", f"-I{ROOT}", "-c", "-keep", "-keep-dir", making,
                        "-o", making / "host.o", source])
            if done.returncode != 0:
                shutil.rmtree(making)
                return None, {}, (done.stderr or done.stdout).strip()
            for file in making.iterdir():
                if file.suffix not in (".ptx", ".o"):
                    file.unlink()
            if folder.exists():
                shutil.rmtree(making)
            else:
                making.rename(folder)
        return folder / "host.o", {f.suffixes[-2].lstrip("."): f for f in folder.glob("*.ptx")}, None

    def assemble(self, ptx, target, source):
        """-> ([Kernel], error)"""
        text = ptx.read_text()
        kept = self.cache / f"{source.stem}-{target}-{digest(self.stamp, text)}.json"
        self.used.add(kept)
        if kept.exists():
            return [Kernel(**each) for each in json.loads(kept.read_text())], None
        cubin = kept.with_suffix(f".{os.getpid()}.cubin")
        try:
            done = run([self.ptxas, "-v", "-m64", f"-arch={target}", ptx, "-o", cubin])
            if done.returncode != 0:
                return [], done.stderr.strip()
            kernels = read_report(done.stderr + done.stdout, text, target, str(source.relative_to(self.root)))
            if target in PORTABLE:
                code = run([self.disassembler, "-c", cubin])
                if code.returncode != 0:
                    return [], code.stderr.strip()
                count_instructions(code.stdout, kernels)
        finally:
            cubin.unlink(missing_ok=True)
        making = kept.with_suffix(f".{os.getpid()}")
        making.write_text(json.dumps([vars(k) for k in kernels]))
        making.rename(kept)
        return kernels, None

    def prune(self):
        """Results that nothing has asked for in a day."""
        for path in self.cache.iterdir():
            if path not in self.used and time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def record_launches(self, objects):
        """-> ([(symbol, device, threads, shared bytes, blocks per cluster)], error)"""
        program = self.cache / f"kernel_launches.{os.getpid()}"
        sources = [ROOT / "scripts/kernel_launches.cpp", *sorted((self.root / "cuda").rglob("*.cpp"))]
        try:
            built = run(["g++", "-std=c++20", "-O1", f"-I{ROOT}", f"-I{self.include}", *sources, *objects, "-o", program])
            if built.returncode != 0:
                return [], "scripts/kernel_launches.cpp: " + built.stderr.strip()
            launches = set()
            for hopper in "01":
                done = subprocess.run([program], capture_output=True, text=True, env={**os.environ, "XLSTM_HOPPER": hopper})
                if done.returncode != 0:
                    return [], "scripts/kernel_launches.cpp: " + done.stderr.strip()
                launches |= set(done.stdout.splitlines())
            return [(symbol, *map(int, rest)) for symbol, *rest in map(str.split, sorted(launches))], None
        finally:
            program.unlink(missing_ok=True)
