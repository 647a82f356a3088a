"""Kernels against their budgets, and launches against both."""

import concurrent.futures
import os
import re

from .budgets import BUDGETS, DEVICES, PORTABLE, TARGET_OF_DEVICE
from .toolchain import CONDITIONAL


def blocks_per_multiprocessor(kernel, device):
    """How many blocks the registers, shared memory and threads of one multiprocessor hold."""
    limits = DEVICES[device]
    shared = kernel.dynamic_shared + kernel.static_shared + 1024
    return min(65536 // (-(-kernel.registers // 8) * 8 * kernel.threads), limits.total_kib * 1024 // shared,
               limits.threads // kernel.threads, limits.blocks)


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
        return wrong + ["has no budget in scripts/kernel_report/budgets.py"]
    arguments = kernel.name.partition("<")[2].rstrip(">").split(",")
    threads = limits.threads(*arguments) if callable(limits.threads) else limits.threads
    if kernel.threads != threads:
        wrong.append(f"launch bounds of {kernel.threads} threads, the budget says {threads}")
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
            name, fewest, most = limits.products(*arguments)
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
        limits = find_budget(kernel)
        if threads != kernel.threads and not (limits and limits.fewer and threads < kernel.threads):
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
