"""What the assembler reports of a kernel and what its machine code holds."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field

# Counted in the machine code: name -> pattern of the whole opcode.
INSTRUCTIONS = {
    "HMMA": r"HMMA\.16816\.F32(\.BF16)?",
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
