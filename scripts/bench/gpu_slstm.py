"""The sLSTM and the LSTM on a GPU beside FlashRNN and cuDNN's LSTM, in one run.

    python scripts/bench/gpu_slstm.py [--suites heads,batches,times,blocks,decode] [--limit SECONDS] [--out FOLDER]

First every operator is compared with the recurrence in float64; then forward, backward and both together, from three or
more input sets that take turns (more than the L2 cache holds). "slstm" and "lstm" take wx; "layer" computes it from x as
cuDNN's LSTM does, which has one dense head and is timed where NH = 1. The number that counts is the time per time step:
steps follow each other, whatever the batch. FLOP are those of the recurrent products.
Writes gpu_slstm.json and gpu_slstm.png into FOLDER (default scripts/bench/results). Exit 1 where ours is wrong or fails.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
sys.path.append(str(ROOT))

import command_line  # noqa: E402
import peers  # noqa: E402
from gpu_cases import OURS, relative_error  # noqa: E402
from gpu_slstm_cases import HEADS, SUITES, Case, cases, input_sets, make_inputs, plot, reference, work  # noqa: E402
from timing import gpu_machine, kernel_times, measure, write_report  # noqa: E402

NAMES = {"slstm": ("wx", "r", "b"), "lstm": ("wx", "r", "b"), "layer": ("x", "weight", "r", "b")}
# Largest ||ours - reference|| / ||reference||; y goes into the next step's product in bfloat16, or with 16 bits.
LIMITS = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def ours():
    run = torch.ops.xlstm.slstm

    def layer(x, weight, r, b):
        wx = F.linear(x, weight).view(*x.shape[:2], 4, 1, x.shape[2])
        return run(wx, r, b, cell="lstm")[0]

    return [peers.Recurrence(OURS, lambda wx, r, b: run(wx, r, b)[0], "slstm"),
            peers.Recurrence(OURS + ", recompute", lambda wx, r, b: run(wx, r, b, recompute=True)[0], "slstm"),
            peers.Recurrence(OURS + ", lstm", lambda wx, r, b: run(wx, r, b, cell="lstm")[0], "lstm"),
            peers.Recurrence(OURS + ", lstm layer", layer, "layer")]


def is_ours(operator):
    return operator.name.startswith(OURS)


def belongs(operator, case):
    return case.heads == 1 or operator.kind != "layer"


def check(operator, case, dtype, device):
    """name -> relative error of y and of the gradients."""
    tensors, weight = make_inputs(case, operator.kind, dtype, device, seed=7)
    y = operator.function(*tensors)
    gradients = torch.autograd.grad(y, tensors, weight.to(y.dtype))
    plain = [x.detach().double().requires_grad_() for x in tensors]
    wanted_y = reference(plain, operator.kind)
    wanted = torch.autograd.grad(wanted_y, plain, weight.double())
    return {"y": relative_error(y, wanted_y)} | {
        "d" + name: relative_error(g, w) for name, g, w in zip(NAMES[operator.kind], gradients, wanted)}


def check_all(operators, shapes, dtype, device, length):
    """Checks of every operator at every head size; ours must hold the limits."""
    rows, bad = [], []
    for heads, dh in shapes:
        case = Case("check", 16, length, heads, dh)
        for operator in operators:
            if not belongs(operator, case):
                continue
            row = {"operator": operator.name, "heads": heads, "dh": dh}
            try:
                row["errors"] = check(operator, case, dtype, device)
                shown = "  ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
            except Exception as error:
                row["failed"] = shown = f"{type(error).__name__}: {error}"
            row["within_limits"] = "errors" in row and all(e <= LIMITS[dtype] for e in row["errors"].values())
            rows.append(row)
            if is_ours(operator) and not row["within_limits"]:
                bad.append(f"{operator.name} NH={heads} DH={dh}: {shown}")
            print(f"  {operator.name:28} NH={heads} DH={dh}  {shown[:160]}", flush=True)
    return rows, bad


# ---- timing --------------------------------------------------------------------------------------------------------


def passes(operator, sets):
    """name -> prepare(), for timing.measure."""

    def forward():
        def run(tensors):
            with torch.no_grad():
                return operator.function(*tensors)

        return [lambda t=t: run(t) for t, _ in sets]

    def both():
        return [lambda t=t, w=w: torch.autograd.grad(operator.function(*t), t, w) for t, w in sets]

    def backward():
        kept = [(operator.function(*t), t, w) for t, w in sets]
        return [lambda y=y, t=t, w=w: torch.autograd.grad(y, t, w, retain_graph=True) for y, t, w in kept]

    return {"forward": forward, "backward": backward, "both": both}


def time_operator(case, operator, dtype, device, effort):
    """{"forward", "backward", "both"} or {"failed"}."""
    result = {"kind": operator.kind}
    try:
        sets = input_sets(case, operator.kind, dtype, device)
        result["input_sets"] = len(sets)
        prepared = passes(operator, sets)
        flop = work(case)
        for name, prepare in prepared.items():
            result[name] = measure(prepare, device, effort, graph=operator.capturable)
            ms = result[name]["median_ms"]
            result[name] |= {"step_us": 1e3 * ms / case.time, "tflop_per_s": flop[name] / ms / 1e9}
        if is_ours(operator) and device.type == "cuda":
            result["kernels_ms"] = kernel_times(prepared["both"]()[0])
    except Exception as error:
        result["failed"] = f"{type(error).__name__}: {error}"[:500]
    return result


def ratios(times):
    """peer -> {"ours", "forward", "backward", "both"}: time of the peer over that of our first operator of its kind."""
    mine = {}
    for name, result in times.items():
        if name.startswith(OURS):
            mine.setdefault(result["kind"], name)
    found = {}
    for name, result in times.items():
        first = mine.get(result["kind"])
        if name.startswith(OURS) or first is None or "failed" in result or "failed" in times[first]:
            continue
        found[name] = {"ours": first} | {p: result[p]["median_ms"] / times[first][p]["median_ms"]
                                         for p in ("forward", "backward", "both")}
    return found


def time_case(case, operators, args):
    times = {}
    print(f"\n{case.title()}", flush=True)
    for operator in operators:
        if not belongs(operator, case):
            continue
        times[operator.name] = result = time_operator(case, operator, args.dtype, args.device, args.effort)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        shown = "failed: " + result["failed"][:120] if "failed" in result else "  ".join(
            f"{name} {result[name]['median_ms']:9.3f} ms ({result[name]['step_us']:.2f} us/step)"
            for name in ("forward", "backward", "both"))
        print(f"  {operator.name:28} {shown}", flush=True)
    return {"case": asdict(case), "times": times, "ratios": ratios(times)}


def time_steps(args):
    """Decoding: one token from a given state, without gradients."""
    report = {"cases": []}
    print("\ndecoding, one token", flush=True)
    for heads, dh in [(2, 16)] if args.tiny else [(12, 64), (4, 256), (4, 512)]:
        for batch in (1, 2) if args.tiny else [4**n for n in range(6)]:
            if time.monotonic() > args.end:
                report.setdefault("skipped", []).append(f"B={batch} NH={heads} DH={dh}")
                continue
            sets = input_sets(Case("decode", batch, 1, heads, dh), "slstm", args.dtype, args.device)
            state = [torch.rand(batch, heads, dh, device=args.device) + 0.5 for _ in range(4)]

            def step(tensors):
                with torch.no_grad():
                    return torch.ops.xlstm.slstm(*tensors, *state)

            calls = [lambda t=t: step(t) for t, _ in sets]
            result = measure(lambda: calls, args.device, args.effort)
            report["cases"].append({"batch": batch, "heads": heads, "dh": dh, "times": {OURS: result}})
            print(f"  B={batch:<5} NH={heads} DH={dh}  {1e3 * result['median_ms']:9.1f} us", flush=True)
    return report


# ---- report --------------------------------------------------------------------------------------------------------


def print_ratios(report):
    print("\ntimes of the peers over ours (median)\n" + f"{'case':32} {'peer':28} {'fw':>6} {'bw':>6} {'fw+bw':>6}")
    for row in report["cases"]:
        for peer, ratio in row["ratios"].items():
            numbers = " ".join(f"{ratio[name]:6.2f}" for name in ("forward", "backward", "both"))
            print(f"{Case(**row['case']).title():32} {peer:28} {numbers}")


def main(arguments=None):
    args = command_line.parse(command_line.parser(__doc__, "gpu_slstm", ",".join((*SUITES, "decode")), "12x64,3x256 (NH, DH)"),
                              arguments)
    if args.library:
        torch.ops.load_library(args.library)
    else:
        import libxlstm  # noqa: F401  registers torch.ops.xlstm
    operators, absent = ours(), {}
    if args.peers:
        others, absent = peers.recurrences(args.device)
        operators += command_line.wanted_peers(others, args)
    for name, reason in absent.items():
        print(f"not here: {name} ({reason})")
    report = {"machine": gpu_machine(args.device), "packages": peers.versions(), "absent": absent, "dtype": str(args.dtype)}
    print("relative errors against float64")
    shapes = [(2, 16), (1, 16)] if args.tiny else command_line.wanted_heads(HEADS, args)
    report["checks"], bad = check_all(operators, shapes, args.dtype, args.device, 9 if args.tiny else 64)
    report["cases"] = []
    # A wrong operator's speed is no result: nothing is timed then.
    waiting = [] if bad else [case for case in cases(args.suites, args.tiny)
                              if command_line.wanted_heads([(case.heads, case.dh)], args)]
    if "decode" in args.suites and not bad:
        report["steps"] = time_steps(args)
    while waiting and time.monotonic() < args.end:
        report["cases"].append(time_case(waiting.pop(0), operators, args))
        write_report(args.out / f"{args.name}.json", report)
    report["skipped"] = [case.title() for case in waiting]
    bad += [f"{Case(**row['case']).title()}: {name}: {result['failed']}" for row in report["cases"]
            for name, result in row["times"].items() if name.startswith(OURS) and "failed" in result]
    print_ratios(report)
    return command_line.finish(report, bad, args, plot)


if __name__ == "__main__":
    sys.exit(main())
