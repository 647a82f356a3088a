"""Static gates of the CUDA kernels: what the compiler made of them, checked without a GPU.

    python scripts/check_kernels.py [--json FILE] [--markdown] [--only REGEX] [--targets sm_80,sm_90a]

Compiles every cuda/**/*.cu to PTX for compute_80 and compute_90a, assembles it for each GPU that nvcc knows, reads the
assembler's report and the machine code, and writes down how the host code launches every kernel
(scripts/kernel_launches.cpp). Fails (exit 1) on spills, stack or local memory, on any warning of the assembler or
message of the C75xx family, on registers, threads, shared memory or blocks per multiprocessor beyond the budget
(scripts/kernel_report/budgets.py), on missing or forbidden instructions, and on a kernel without a budget or that
nothing launches.
Prints the table; results are kept in build/kernels, so that only what changed is compiled again.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from kernel_report.budgets import PORTABLE
from kernel_report.checking import check_tree, find_budget, has_body
from kernel_report.toolchain import ROOT, Toolchain

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
