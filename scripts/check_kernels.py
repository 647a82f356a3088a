"""Static gates of the CUDA kernels: what the compiler made of them, checked without a GPU.

    python scripts/check_kernels.py [--json FILE] [--markdown] [--only REGEX] [--targets sm_80,sm_90a]

Compiles every cuda/**/*.cu to PTX for compute_80 and compute_90a, assembles it for each GPU that nvcc knows, reads the
assembler's report and the machine code, and writes down how the host code launches every kernel
(scripts/kernel_launches.cpp). Fails (exit 1) on spills, stack or local memory, on any warning of the assembler or
message of the C75xx family, on registers, threads, shared memory or blocks per multiprocessor beyond the budget below,
on missing or forbidden instructions, and on a kernel without a budget or that nothing launches.
Prints the table; results are kept in build/kernels, so that only what changed is compiled again.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The portable build: machine code for these two, PTX compute_80 for the others (the driver assembles it).
PORTABLE = ("sm_80", "sm_90a")
CONDITIONAL = {"sm_90a": "compute_90a"}  # targets that have PTX of their own
FLAGS = ["-std=c++17", "-O3", "--threads", "1"]

MMA = {"HMMA", "LDGSTS", "LDSM"}
VECTOR = {"LDG.128", "STG.128"}
WGMMA = {"HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"}
# Counted in the machine code: name -> pattern of the whole opcode.
INSTRUCTIONS = {
    "HMMA": r"HMMA\.16816\.F32\.BF16",
    "HGMMA": r"HGMMA\..*",
    "LDSM": r"LDSM\..*",
    "STSM": r"STSM\..*",
    "LDGSTS": r"LDGSTS\..*",
    "UTMALDG": r"UTMALDG\..*",
    "LDG.128": r"LDG\.E(\..*)?\.128(\..*)?",
    "STG.128": r"STG\.E(\..*)?\.128(\..*)?",
    "SYNCS": r"SYNCS\..*",
    "USETMAXREG": r"USETMAXREG(\..*)?",
    "DEPBAR": r"WARPGROUP\.DEPBAR(\..*)?",
    "EX2": r"MUFU\.EX2",
    "local": r"(LDL|STL)(\..*)?",
    "float atomics": r"(ATOM|RED)\w*\..*F(16|32|64).*",
}
FORBIDDEN = {"local", "float atomics"}


@dataclass(frozen=True)
class Budget:
    """Of one block on sm_80 or sm_90a; on the other targets only what the compiler must never do is checked."""

    kernel: str  # pattern of the whole name without template arguments
    threads: int
    registers: int
    shared_kib: float  # dynamic + static
    blocks: int = 1  # per multiprocessor, at least
    must: frozenset = frozenset()
    forbidden: frozenset = frozenset()
    only: tuple = PORTABLE  # elsewhere the kernel has no body
    products: Callable | None = None  # template arguments -> (kind, fewest, most) of the matrix instructions


def budget(kernel, threads, registers, shared_kib, blocks=1, must=(), forbidden=(), only=PORTABLE, products=None):
    forbidden = FORBIDDEN | frozenset(forbidden)
    return Budget(kernel, threads, registers, shared_kib, blocks, frozenset(must), forbidden, only, products)


def sweep_products(use, contraction, columns, planes):
    """Of one warp in eight and one chunk of 64 tokens: A S and the update of S, A B^T, P X. Two planes per number take
    three products. The normaliser and the halves of the causal mask may add a quarter."""
    a, x = int(contraction), int(columns)
    fewest = (2 * a * x + 64 * a + 64 * x) * 64 // (16 * 8 * 16) // 8 * (1 if planes == "1" else 3)
    return "HMMA", fewest, fewest * 5 // 4


def fixed_products(by_planes):
    """By the last template argument, the planes per number."""
    return lambda *arguments: ("HMMA", by_planes[arguments[-1]], by_planes[arguments[-1]])


def sweep_sm90_products(use, contraction, columns):
    """Of both consumers and one chunk of 128 tokens, 16 columns or tokens at a time: A S and A B^T of the own half by each
    and A B^T of the other half by one; P X of three halves; the update of S by its owners, that of n by its owners, and
    with h the product with n by each."""
    steps, tokens = int(contraction) // 16, 8
    owners = {"h": int(contraction) // 64, "dv": 0}.get(use, int(columns) // 64)
    count = 5 * steps + 12 + tokens * int(contraction) // 64 + tokens * owners + (2 * steps if use == "h" else 0)
    return "HGMMA", count, count


def slstm_products(channels, block=False):
    """One more than the k16 steps with weights in registers: forward two A tiles per group of units, backward one; a
    block that has a whole head of up to 64 units has no others. Two planes per number take three products. See
    slstm_resident in slstm_params.h."""
    def count(cell_or_states, *rest):
        groups, planes = [1, *map(int, rest)][-2:]
        if block and groups == 1:
            steps = 4 if channels == 1 else 8
        elif channels == 1:
            steps = 16 // groups // planes - (groups - 1) + 1
        else:
            steps = (28 if groups == 1 else 20) // planes + 1
        products = steps * (2 * groups if channels == 1 else 1) * (1 if planes == 1 else 3)
        return "HMMA", products, products
    return count


BUDGETS = [
    # 144 for blocks of 8 by 8, whose 64 weights stay in registers
    budget(r"block_linear_rows", 128, 144, 16, blocks=3, must=VECTOR),
    budget(r"block_linear_weight", 128, 144, 16, blocks=3, must={"LDG.128"}),
    budget(r"headwise_norm_rows", 256, 64, 16, blocks=4, must=VECTOR),
    budget(r"headwise_norm_gradients", 256, 128, 16, blocks=2, must=VECTOR),
    budget(r"headwise_norm_wide_rows", 512, 64, 16, blocks=2, must=VECTOR),
    budget(r"headwise_norm_wide_gradients", 512, 128, 17, blocks=1, must=VECTOR),
    budget(r"softmax_cross_entropy", 256, 64, 16, blocks=4, must=VECTOR),
    # Of one consumer and 64 tokens, 256 columns or 64 tokens at a time: A S, A B^T, four row tiles of S; n; P X.
    budget(r"mlstm_sweep_sm90_wide", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",),
           products=lambda *arguments: ("HGMMA", 56, 56)),
    budget(r"mlstm_sweep_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",), products=sweep_sm90_products),
    # Of one consumer and 64 tokens: two row tiles by four steps.
    budget(r"mlstm_state_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",),
           products=lambda *arguments: ("HGMMA", 8, 8)),
    # Of one consumer, four steps each: a slice of A S, a slice of A B^T, 64 keys of P X.
    budget(r"mlstm_out_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",),
           products=lambda *arguments: ("HGMMA", 12, 12)),
    budget(r"mlstm_\w+_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",)),
    budget(r"mlstm_sweep", 256, 255, 227, must=MMA, forbidden={"HGMMA"}, products=sweep_products),
    budget(r"mlstm_state", 256, 128, 113, must=MMA, forbidden={"HGMMA"}, products=fixed_products({"1": 64, "2": 96})),
    budget(r"mlstm_out", 256, 128, 113, must=MMA, forbidden={"HGMMA"}, products=fixed_products({"1": 96, "2": 144})),
    budget(r"mlstm_gates", 256, 64, 16, blocks=4, must={"STG.128"}),
    budget(r"mlstm_gate_ends", 256, 64, 16, blocks=4),
    budget(r"mlstm_gate_gradients", 512, 64, 16, blocks=2),
    budget(r"mlstm_gate_gradients_short", 256, 64, 16, blocks=4),
    budget(r"mlstm_anchors", 256, 64, 16, blocks=4),
    budget(r"mlstm_prep", 256, 64, 32, blocks=4, must=VECTOR),
    budget(r"mlstm_segment_scan", 256, 64, 16, blocks=4),
    budget(r"mlstm_step_columns", 256, 96, 32, blocks=2, must=VECTOR),
    budget(r"mlstm_step_normaliser", 256, 64, 16, blocks=4),
    # 128 registers hold recurrent weights; all of them where the compiler keeps to one block per multiprocessor
    budget(r"slstm_forward_block", 256, 255, 227, must={"HMMA", "LDSM"}, products=slstm_products(1, block=True)),
    budget(r"slstm_forward_grid", 256, 255, 227, must=MMA, products=slstm_products(1)),
    budget(r"slstm_forward_sm90", 256, 255, 227, must={"HMMA", "LDSM", "SYNCS"}, only=("sm_90a",),
           products=slstm_products(1)),
    budget(r"slstm_backward_block", 256, 255, 227, must={"HMMA", "LDSM"}, products=slstm_products(4, block=True)),
    budget(r"slstm_backward_grid", 256, 255, 227, must=MMA, products=slstm_products(4)),
    budget(r"slstm_backward_sm90", 256, 255, 227, must={"HMMA", "LDSM", "SYNCS"}, only=("sm_90a",),
           products=slstm_products(4)),
    budget(r"slstm_pointwise_\w+", 256, 64, 16, blocks=4),
    budget(r"slstm_clear", 256, 32, 16, blocks=8),
    budget(r"slstm_slopes", 256, 80, 16, blocks=3),
    budget(r"mlstm_step_lazy_columns", 256, 128, 32, blocks=2, must=VECTOR),
    budget(r"mlstm_step_lazy_ring", 256, 64, 32, blocks=4),
    budget(r"causal_conv1d_rows", 128, 64, 32, blocks=4, must={"LDGSTS", "STG.128"}),
    # 72 for widths of 5 to 8 alone
    budget(r"causal_conv1d_gradients", 128, 72, 32, blocks=4, must={"LDGSTS", "STG.128"}),
    budget(r"causal_conv1d_token", 128, 64, 16, blocks=4),
    budget(r"causal_conv1d_(first|last)", 256, 64, 16, blocks=4),
    budget(r"column_sums", 256, 64, 16, blocks=4),
]


@dataclass
class Multiprocessor:
    shared_kib: int  # of a block, at most
    total_kib: int  # of all blocks, 1 KiB of each kept by the system
    threads: int = 2048
    blocks: int = 32


# Compute capability of a launch -> what its multiprocessors hold.
DEVICES = {80: Multiprocessor(163, 164), 86: Multiprocessor(99, 100, threads=1536, blocks=16), 90: Multiprocessor(227, 228)}
TARGET_OF_DEVICE = {80: "sm_80", 86: "sm_86", 90: "sm_90a"}


@dataclass
class Kernel:
    """One kernel assembled for one target."""

    symbol: str
    name: str
    source: str
    target: str
    threads: int = 0
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0
    assembler_ms: float = 0
    instructions: int = 0  # 0: not disassembled
    counts: dict = field(default_factory=dict)
    dynamic_shared: int = 0  # largest of its launches on this target
    blocks_per_multiprocessor: int = 0
    messages: list = field(default_factory=list)


# ---- tools ---------------------------------------------------------------------------------------------------------


def find_disassembler(nvcc):
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [Path(nvcc).parent, *site.glob("nvidia/cu*/bin"), site / "triton/backends/nvidia/bin"]
    found = [folder / "nvdisasm" for folder in folders if (folder / "nvdisasm").exists()]
    return str(found[0]) if found else shutil.which("nvdisasm")


def run(command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def digest(*parts):
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:16]


def demangle(symbols):
    filt = shutil.which("c++filt")
    if not filt or not symbols:
        return {s: s for s in symbols}
    lines = subprocess.run([filt], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(symbols, map(short_name, lines)))


def short_name(demangled):
    """void a::b::mlstm_out<(a::b::Use)3, 2>(a::b::SweepParams) -> mlstm_out<dk,2>"""
    name = re.sub(r"\(\w*::\w+::Use\)(\d)", lambda m: ("h", "dv", "dq", "dk")[int(m[1])], demangled)
    name = re.sub(r"\((?!anonymous)[^()]*\)$", "", name.replace("(anonymous namespace)::", ""))
    head, _, arguments = name.removeprefix("void ").partition("<")
    arguments = re.sub(r"\([^()]*\)|\w+::| ", "", arguments)
    return head.split("::")[-1] + ("<" + arguments if arguments else "")


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
        self.stamp = digest(self.version, FLAGS, Path(__file__).read_text(), Path(self.disassembler).stat().st_size)
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


# ---- reading -------------------------------------------------------------------------------------------------------


def read_report(report, ptx, target, source):
    """What ptxas -v says of every kernel."""
    threads = {m[1]: int(m[2]) for m in re.finditer(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)}
    names = demangle(re.findall(r"\.entry (\w+)\(", ptx))
    kernels, messages = [], []
    for line in report.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append(Kernel(m[1], names[m[1]], source, target, threads.get(m[1], 0)))
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernels:
                k = kernels[-1]
                k.stack, k.spill_stores, k.spill_loads = (max(a, int(b)) for a, b in zip(
                    (k.stack, k.spill_stores, k.spill_loads), m.groups()))
        elif m := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(m[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[-1].static_shared = int(shared[1])
        elif m := re.search(r"Compile time = ([\d.]+) ms", line):
            kernels[-1].assembler_ms = float(m[1])
        elif "warning" in line.lower() or re.search(r"\bC7\d\d\d\b", line):
            messages.append(line.strip())
    for message in messages:
        about = [k for k in kernels if k.symbol in message] or kernels
        for kernel in about:
            kernel.messages.append(message)
    return kernels


def count_instructions(code, kernels):
    """Adds the counts of INSTRUCTIONS, from nvdisasm's text."""
    sections = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|^//-----|\Z)", code, re.M | re.S))
    for kernel in kernels:
        opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sections[kernel.symbol], re.M)
        kernel.instructions = len(opcodes)
        found = {name: sum(re.fullmatch(pattern, o) is not None for o in opcodes) for name, pattern in INSTRUCTIONS.items()}
        kernel.counts = {name: count for name, count in found.items() if count}


def blocks_per_multiprocessor(kernel, device):
    """How many blocks the registers, shared memory and threads of one multiprocessor hold."""
    limits = DEVICES[device]
    shared = kernel.dynamic_shared + kernel.static_shared + 1024
    return min(65536 // (-(-kernel.registers // 8) * 8 * kernel.threads), limits.total_kib * 1024 // shared,
               limits.threads // kernel.threads, limits.blocks)


# ---- checking ------------------------------------------------------------------------------------------------------


def has_body(kernel, limits):
    return limits is None or limits.only == PORTABLE or kernel.target in limits.only


def find_budget(kernel):
    base = kernel.name.partition("<")[0]
    return next((b for b in BUDGETS if re.fullmatch(b.kernel, base)), None)


def check_kernel(kernel):
    """What is wrong with it, as sentences."""
    limits = find_budget(kernel)
    wrong = list(kernel.messages)
    if kernel.stack or kernel.spill_stores or kernel.spill_loads:
        wrong.append(f"{kernel.stack} bytes of stack, {kernel.spill_stores} of spill stores, {kernel.spill_loads} of "
                     "spill loads, must be 0")
    if limits is None:
        return wrong + ["has no budget in scripts/check_kernels.py"]
    if kernel.threads != limits.threads:
        wrong.append(f"launch bounds of {kernel.threads} threads, the budget says {limits.threads}")
    if kernel.target not in PORTABLE:
        return wrong
    if kernel.registers > limits.registers:
        wrong.append(f"{kernel.registers} registers, at most {limits.registers}")
    if kernel.static_shared + kernel.dynamic_shared > limits.shared_kib * 1024:
        wrong.append(f"{kernel.static_shared + kernel.dynamic_shared} bytes of shared memory, "
                     f"at most {limits.shared_kib:g} KiB")
    if has_body(kernel, limits):
        wrong += [f"no {name} instruction" for name in sorted(limits.must) if not kernel.counts.get(name)]
        if limits.products:
            name, fewest, most = limits.products(*kernel.name.partition("<")[2].rstrip(">").split(","))
            if not fewest <= kernel.counts.get(name, 0) <= most:
                wrong.append(f"{kernel.counts.get(name, 0)} {name} instructions, expected {fewest} to {most}")
    wrong += [f"{kernel.counts[name]} instructions of the kind {name}, must be 0"
              for name in sorted(limits.forbidden) if kernel.counts.get(name)]
    if 0 < kernel.blocks_per_multiprocessor < limits.blocks:
        wrong.append(f"{kernel.blocks_per_multiprocessor} blocks fit a multiprocessor, at least {limits.blocks} must")
    return wrong


def apply_launches(kernels, launches):
    """Dynamic shared memory and occupancy from the launches; -> what is wrong with these."""
    wrong, bounds = [], {}
    by_place = {(k.symbol, k.target): k for k in kernels}
    launched = {symbol for symbol, *_ in launches}
    for symbol, device, threads, shared, _ in launches:
        kernel = by_place.get((symbol, TARGET_OF_DEVICE[device])) or by_place.get((symbol, "sm_80"))
        if kernel is None:
            continue
        if threads != kernel.threads:
            wrong.append(f"{kernel.name}: launched with {threads} threads, its launch bounds say {kernel.threads}")
        if shared > DEVICES[device].shared_kib * 1024:
            wrong.append(f"{kernel.name}: launched with {shared} bytes of shared memory on compute capability "
                         f"{device / 10:.1f}, which has {DEVICES[device].shared_kib} KiB")
        if kernel.target == TARGET_OF_DEVICE[device]:
            kernel.dynamic_shared = max(kernel.dynamic_shared, shared)
            bounds[symbol, kernel.target] = device
    for place, device in bounds.items():
        by_place[place].blocks_per_multiprocessor = blocks_per_multiprocessor(by_place[place], device)
    unused = sorted({k.name for k in kernels if k.symbol not in launched})
    return sorted(set(wrong)) + [f"{name}: no problem of scripts/kernel_launches.cpp launches it" for name in unused]


def check_tree(tools, sources, targets, with_launches):
    """Compiles, assembles and checks; -> (kernels, failures)"""
    kernels, failures, objects = [], [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        assembling = []
        compiling = {pool.submit(tools.compile, source): source for source in sources}
        for done in concurrent.futures.as_completed(compiling):
            source, (host, ptx, error) = compiling[done], done.result()
            if error:
                failures.append(f"{source.name} does not compile: {error}")
                continue
            objects.append(host)
            for target in targets:
                file = ptx[CONDITIONAL.get(target, "compute_80")]
                assembling.append((source, target, pool.submit(tools.assemble, file, target, source)))
        for source, target, done in assembling:
            found, error = done.result()
            kernels += found
            if error:
                failures.append(f"{source.name} does not assemble for {target}: {error}")
    if with_launches:
        launches, error = tools.record_launches(objects)
        failures += [error] if error else apply_launches(kernels, launches)
    order = {target: i for i, target in enumerate(targets)}
    kernels.sort(key=lambda k: (k.name, order[k.target]))
    found = {}
    for kernel in kernels:
        for what in check_kernel(kernel):
            found.setdefault((kernel.name, what), []).append(kernel.target)
    return kernels, failures + [f"{name} {' '.join(where)}: {what}" for (name, what), where in found.items()]


# ---- table ---------------------------------------------------------------------------------------------------------

COUNTED = ("HMMA", "HGMMA", "LDSM", "STSM", "LDGSTS", "UTMALDG", "LDG.128", "STG.128", "EX2")


def kernel_rows(kernels):
    yield ["kernel", "target", "threads", "registers", "spills", "shared KiB", "blocks/SM", "instructions", *COUNTED]
    for k in kernels:
        if k.target in PORTABLE and has_body(k, find_budget(k)):
            shared = f"{(k.dynamic_shared + k.static_shared) / 1024:.1f}" if k.blocks_per_multiprocessor else "-"
            yield [k.name, k.target, k.threads, k.registers, k.spill_stores + k.spill_loads, shared,
                   k.blocks_per_multiprocessor or "-", k.instructions, *(k.counts.get(name, "") for name in COUNTED)]


def target_rows(kernels, targets):
    yield ["target", "kernels", "most registers", "with stack or spills", "with messages", "assembler seconds"]
    for target in targets:
        here = [k for k in kernels if k.target == target]
        yield [target, len(here), max((k.registers for k in here), default=0),
               sum(bool(k.stack or k.spill_stores or k.spill_loads) for k in here), sum(bool(k.messages) for k in here),
               f"{sum(k.assembler_ms for k in here) / 1000:.1f}"]


def format_table(rows, markdown):
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [i > 0 and all(re.fullmatch(r"[\d.]*|-", row[i]) for row in rows[1:]) for i in range(len(widths))]
    cells = [[c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in cells)
    rule = [("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def format_json(version, targets, kernels, failures):
    """One line per kernel and target; what is 0 or empty is left out."""
    lines = [json.dumps({name: value for name, value in vars(k).items() if value}) for k in kernels]
    head = json.dumps({"nvcc": version, "targets": targets, "failures": failures})
    return head[:-1] + ', "kernels": [\n' + ",\n".join(lines) + "\n]}\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write everything that was read, and the failures")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--only", help="sources whose name matches this pattern; launches are then not looked at")
    parser.add_argument("--targets", help="comma list, default all that nvcc knows from sm_80 on")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds cuda/ (default: this repository)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "kernels", help="where results are kept")
    args = parser.parse_args(arguments)
    tools = Toolchain(args.cache, args.root.resolve())
    targets = args.targets.split(",") if args.targets else tools.targets
    if unknown := set(targets) - set(tools.targets):
        sys.exit(f"error: nvcc {tools.version} does not know {', '.join(sorted(unknown))}")
    sources = [p for p in sorted((tools.root / "cuda").rglob("*.cu")) if not args.only or re.search(args.only, p.name)]
    if not sources:
        sys.exit(f"error: no .cu file in {tools.root / 'cuda'}")
    begin = time.monotonic()
    complete = not args.only and tools.root == ROOT and set(PORTABLE) <= set(targets)
    kernels, failures = check_tree(tools, sources, targets, complete)
    if complete:
        tools.prune()
    print(format_table(kernel_rows(kernels), args.markdown) + "\n")
    print(format_table(target_rows(kernels, targets), args.markdown) + "\n")
    for failure in failures:
        print(f"FAIL {failure}")
    print(f"nvcc {tools.version}: {len({k.symbol for k in kernels})} kernels for {len(targets)} targets, "
          f"{len(failures)} failures ({time.monotonic() - begin:.0f} s)")
    if args.json:
        args.json.write_text(format_json(tools.version, targets, kernels, failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
