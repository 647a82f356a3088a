"""The mLSTM on a GPU beside the packages people use today and the machine's own limits, in one run.

    python scripts/bench/gpu_mlstm.py [--suites standard,tokens,blocks,small,decode] [--limit SECONDS] [--out FOLDER]

First every operator is compared with a float64 reference, and the bandwidth of a copy and the rate of an 8192^3 bfloat16
product are measured; then forward, backward and both together, each package in the layout and with the chunk size that
suits it best, from three or more input sets that take turns (more than the L2 cache holds). Gates follow N(-3,1) and
N(3,1); --gates normal takes N(0,1) for both. --limit never cuts the standard suite. "% of limit": the larger of FLOP / product
rate and bytes / bandwidth, over the time; FLOP and bytes are what the chunkwise form needs at least (gpu_cases.work).
Writes gpu_mlstm.json and gpu_mlstm.png into FOLDER (default scripts/bench/results). Exit 1 where ours is wrong or fails.
"""

import os
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
from gpu_cases import (  # noqa: E402
    HEADS, NAMES, OURS, STANDARD, Case, cases, make_inputs, plot, reference, relative_error, ring_of, set_count, step_sets,
    work,
)
from timing import Effort, gpu_machine, kernel_times, measure, rooflines, write_report  # noqa: E402

# Largest ||ours - reference|| / ||reference||; the forget gate's gradient sums many tokens.
LIMITS = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2), torch.float32: (2e-5, 2e-5)}
# ---- operators -----------------------------------------------------------------------------------------------------


def load_ours(library, device, dtype):
    if library:
        torch.ops.load_library(library)
    else:
        import libxlstm  # noqa: F401  registers torch.ops.xlstm
    hopper = os.environ.get("XLSTM_HOPPER") != "0" and device.type == "cuda" and dtype == torch.bfloat16 and (
        torch.cuda.get_device_capability(device) == (9, 0))
    label = OURS + (" (sm_90a kernels)" if hopper else "")
    run = torch.ops.xlstm.mlstm_chunkwise

    def make(**options):
        return lambda q, k, v, i, f: run(q, k, v, i, f, **options)[0]

    return [
        peers.Operator(label, make(), "exp", heads_first=False),
        peers.Operator(label + ", sigmoid", make(input_gate="sigmoid"), "sigmoid", heads_first=False),
        peers.Operator(label + ", sigmoid, no norm", make(input_gate="sigmoid", normalize=False), "sigmoid plain",
                       heads_first=False),
    ]


def is_ours(operator):
    return operator.name.startswith(OURS)


def check(operator, chunk, shape, dtype, device, length):
    """name -> relative error of h and of the gradients, from one small call."""
    case = Case("check", 1, length, 2, *shape)
    tensors, weight = make_inputs(case, operator, dtype, device, "open", seed=7)
    h = operator.function(*tensors, **({"chunk_size": chunk} if chunk else {}))
    gradients = torch.autograd.grad(h, tensors, weight, allow_unused=True)
    plain = [x.detach().double() for x in tensors]
    if operator.heads_first:
        plain = [x.transpose(1, 2) for x in plain]
        h, weight = h.transpose(1, 2), weight.transpose(1, 2)
        gradients = [g if g is None else g.transpose(1, 2) for g in gradients]
    plain = [x.requires_grad_() for x in plain]
    wanted_h = reference(*plain, operator.kind)
    wanted = torch.autograd.grad(wanted_h, plain, weight.double(), allow_unused=True)
    errors = {"h": relative_error(h, wanted_h)}
    for name, got, want in zip(NAMES, gradients, wanted):
        if got is not None and want is not None:
            errors["d" + name] = relative_error(got, want)
    return errors


def check_all(operators, shapes, dtype, device, length):
    """Checks of every operator at every head size; ours must hold the limits."""
    rows, bad = [], []
    for operator in operators:
        if operator.kind == "attention":
            continue
        for shape in shapes:
            row = {"operator": operator.name, "dqk": shape[0], "dv": shape[1]}
            try:
                row["errors"] = check(operator, operator.chunk_sizes[0], shape, dtype, device, length)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            usual, forget = LIMITS[dtype]
            right = "errors" in row and all(e <= (forget if n == "dfgate" else usual) for n, e in row["errors"].items())
            row["within_limits"] = right
            if is_ours(operator) and not right:
                bad.append(f"{operator.name} ({shape[0]},{shape[1]}): {row.get('failed') or row['errors']}")
            shown = row.get("failed") or "  ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
            print(f"  {operator.name:32} ({shape[0]},{shape[1]})  {shown[:160]}", flush=True)
    return rows, bad


# ---- timing --------------------------------------------------------------------------------------------------------


def passes(operator, chunk, sets):
    """name -> prepare(), for timing.measure."""
    options = {"chunk_size": chunk} if chunk else {}
    needed = sets[0][0][:3] if operator.kind == "attention" else (
        [x for n, x in zip(NAMES, sets[0][0]) if n != "igate"] if operator.kind == "decay" else sets[0][0])
    places = [next(i for i, x in enumerate(sets[0][0]) if x is y) for y in needed]

    def forward():
        def run(tensors):
            with torch.no_grad():
                return operator.function(*tensors, **options)

        return [lambda t=t: run(t) for t, _ in sets]

    def both():
        def run(tensors, weight):
            h = operator.function(*tensors, **options)
            return torch.autograd.grad(h, [tensors[i] for i in places], weight)

        return [lambda t=t, w=w: run(t, w) for t, w in sets]

    def backward():
        kept = [(operator.function(*t, **options), [t[i] for i in places], w) for t, w in sets]
        return [lambda h=h, t=t, w=w: torch.autograd.grad(h, t, w, retain_graph=True) for h, t, w in kept]

    return {"forward": forward, "backward": backward, "both": both}


def time_operator(case, operator, dtype, device, gates, effort):
    """{"chunk_size", "forward", "backward", "both"} at the best chunk size, or {"failed"}."""
    first = make_inputs(case, operator, dtype, device, gates, seed=0)
    size = sum(x.numel() * x.element_size() for x in first[0])
    sets = [first] + [make_inputs(case, operator, dtype, device, gates, seed=n) for n in range(1, set_count(size, device))]
    sizes = [c for c in operator.chunk_sizes if c is None or (c <= case.time and case.time % c == 0)]
    scan = {}
    result = {"input_sets": len(sets)}
    try:
        quick = Effort(warm_up=3, calls=3, samples=5, seconds=0.1)
        for chunk in sizes if len(sizes) > 1 else []:
            try:
                scan[chunk] = measure(passes(operator, chunk, sets)["both"], device, quick)["median_ms"]
            except Exception as error:
                scan[chunk] = f"{type(error).__name__}: {error}"[:200]
        timed = {c: ms for c, ms in scan.items() if not isinstance(ms, str)}
        chunk = min(timed, key=timed.get) if timed else sizes[0]
        result |= {"chunk_size": chunk, "scan_both_ms": scan}
        prepared = passes(operator, chunk, sets)
        for name, prepare in prepared.items():
            result[name] = measure(prepare, device, effort)
        if is_ours(operator) and device.type == "cuda":
            result["kernels_ms"] = kernel_times(prepared["both"]()[0])
    except Exception as error:
        result["failed"] = f"{type(error).__name__}: {error}"[:500]
    return result


def add_rates(result, case, limits):
    """TFLOP/s, GB/s and share of the machine's limit, of our own work counts."""
    forward, backward = work(case)
    both = tuple(a + b for a, b in zip(forward, backward))
    for name, (flop, size) in {"forward": forward, "backward": backward, "both": both}.items():
        if name not in result:
            continue
        ms = result[name]["median_ms"]
        least = max(flop / limits["product"]["tflop_per_s"] / 1e9, size / limits["copy"]["gb_per_s"] / 1e6)
        result[name] |= {"tflop_per_s": flop / ms / 1e9, "gb_per_s": size / ms / 1e6, "share_of_limit": least / ms}


def ratios(times):
    """peer -> {"ours", "forward", "both"}: time of the peer over the time of our operator of the same kind."""
    ours = {r["kind"]: name for name, r in times.items() if name.startswith(OURS)}
    found = {}
    for name, result in times.items():
        mine = ours.get(result["kind"], ours.get("exp"))
        if name in ours.values() or "failed" in result or mine is None or "failed" in times[mine]:
            continue
        found[name] = {"ours": mine} | {p: result[p]["median_ms"] / times[mine][p]["median_ms"]
                                        for p in ("forward", "backward", "both")}
    return found


def belongs(operator, case):
    """The sigmoid gate only at the standard sizes; attention once per T, on as many tokens of the same width."""
    if operator.kind == "attention":
        return (case.heads, case.dqk, case.dv) == STANDARD[0] and case.suite in ("standard", "tokens")
    return case.suite == "standard" or not operator.kind.startswith("sigmoid")


def time_case(case, operators, args, limits):
    times = {}
    print(f"\n{case.title()}", flush=True)
    for operator in operators:
        if not belongs(operator, case):
            continue
        result = {"kind": operator.kind} | time_operator(case, operator, args.dtype, args.device, args.gates, args.effort)
        if operator.kind != "attention":
            add_rates(result, case, limits)
        times[operator.name] = result
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {operator.name:32} {describe(result)}", flush=True)
    return {"case": asdict(case), "times": times, "ratios": ratios(times)}


def describe(result):
    if "failed" in result:
        return "failed: " + result["failed"][:120]
    chunk = f"  chunk {result['chunk_size']}" if result["chunk_size"] else ""
    share = f"  {100 * result['both']['share_of_limit']:.0f} % of limit" if "share_of_limit" in result["both"] else ""
    return (f"fw {result['forward']['median_ms']:9.3f}  bw {result['backward']['median_ms']:9.3f}  "
            f"fw+bw {result['both']['median_ms']:9.3f} ms{share}{chunk}")


# ---- decoding ------------------------------------------------------------------------------------------------------


LAZY = OURS + ", lazy"


def step_functions(device, with_peers):
    """name -> function(q, k, v, i, f, state, spare), {name of a peer: why it is not here}."""
    others, absent = peers.mlstm_steps(device)
    step, lazy = torch.ops.xlstm.mlstm_step, torch.ops.xlstm.mlstm_step_lazy
    ours = {OURS: lambda q, k, v, i, f, state, spare: step(q, k, v, i, f, *state),
            LAZY: lambda q, k, v, i, f, state, spare: lazy(q, k, v, i, f, *state)}
    return ours | (dict(others) if with_peers else {}), absent


def step_state(name, state, token, spread=True):
    """c, n, m as the function of that name takes them, with a ring for the lazy one."""
    if name == LAZY:
        return [*state, *ring_of(token[1], token[2], spread=spread)]
    return state if name.startswith(OURS) else [state[0], state[1], state[2][..., None]]


def check_step(functions, dtype, device):
    """Our step and the peers' against float64, one token from a random state."""
    batch, heads, dqk, dv = 2, 2, 64, 64
    (q, k, v, i, f), (c, n, m) = step_sets(batch, heads, dqk, dv, dtype, device)[0]
    wide = [x.double() for x in (q, k, v, i, f, c, n, m)]
    new_m = torch.maximum(F.logsigmoid(wide[4]) + wide[7], wide[3])
    keep, take = torch.exp(F.logsigmoid(wide[4]) + wide[7] - new_m), torch.exp(wide[3] - new_m)
    new_c = keep[..., None, None] * wide[5] + take[..., None, None] * wide[1][..., None] * wide[2][..., None, :]
    new_n = keep[..., None] * wide[6] + take[..., None] * wide[1]
    query = wide[0] * dqk**-0.5
    norm = torch.maximum((query * new_n).sum(-1).abs(), torch.exp(-new_m)) + 1e-6
    wanted = (query[..., None] * new_c).sum(-2) / norm[..., None]
    errors = {}
    for name, function in functions.items():
        state, spare = ([make(x) for x in (c, n, m)] for make in (torch.clone, torch.empty_like))
        state, spare = (step_state(name, x, (q, k, v), spread=False) for x in (state, spare))
        h = function(q, k, v, i, f, state, spare)
        errors[name] = {"h": relative_error(h, wanted)}
        if name == LAZY:
            torch.ops.xlstm.mlstm_fold(*state)
        if name.startswith(OURS):
            errors[name] |= {"c": relative_error(state[0], new_c), "n": relative_error(state[1], new_n)}
        print(f"  {name:32} " + "  ".join(f"{part} {error:.1e}" for part, error in errors[name].items()))
    return errors


def time_steps(args, limits, tiny):
    functions, absent = step_functions(args.device, args.peers)
    print("\ndecoding step against float64")
    report = {"absent": absent, "errors": check_step(functions, args.dtype, args.device), "cases": []}
    usual = LIMITS[args.dtype][0]
    report["bad"] = [f"{name}: {errors}" for name, errors in report["errors"].items()
                     if name.startswith(OURS) and not all(e <= usual for e in errors.values())]
    shapes = [(2, 16, 16)] if tiny else command_line.wanted_heads(STANDARD, args)
    for heads, dqk, dv in shapes:
        for batch in (1, 2) if tiny else [4**n for n in range(6)]:
            if time.monotonic() > args.end or report["bad"]:
                report.setdefault("skipped", []).append(f"B={batch} NH={heads} DQK={dqk} DV={dv}")
                continue
            sets = step_sets(batch, heads, dqk, dv, args.dtype, args.device)
            spare = [torch.empty_like(x) for x in sets[0][1]]
            size = 8 * batch * heads * dqk * dv
            row = {"batch": batch, "heads": heads, "dqk": dqk, "dv": dv, "times": {}}
            for name, function in functions.items():
                spares = step_state(name, spare, sets[0][0])
                calls = [lambda t=t, s=step_state(name, s, t), o=spares: function(*t, s, o) for t, s in sets]
                try:
                    result = measure(lambda: calls, args.device, args.effort)
                    moved = size * (1 / 2 + 1 / 16 if name == LAZY else 1)  # read once, written and read at a fold
                    result["gb_per_s"] = moved / result["median_ms"] / 1e6
                    result["share_of_limit"] = result["gb_per_s"] / limits["copy"]["gb_per_s"]
                    shown = f"{1e3 * result['median_ms']:9.1f} us  {100 * result['share_of_limit']:.0f} % of limit"
                except Exception as error:
                    result = {"failed": f"{type(error).__name__}: {error}"[:500]}
                    shown = "failed: " + result["failed"][:120]
                row["times"][name] = result
                print(f"  B={batch:<5} NH={heads} ({dqk},{dv})  {name:28} {shown}", flush=True)
            report["cases"].append(row)
    return report


# ---- report --------------------------------------------------------------------------------------------------------


def print_ratios(report):
    print("\ntimes of the peers over ours (median)\n" + f"{'case':42} {'peer':32} {'fw':>6} {'bw':>6} {'fw+bw':>6}")
    for row in report["cases"]:
        for peer, ratio in row["ratios"].items():
            numbers = " ".join(f"{ratio[name]:6.2f}" for name in ("forward", "backward", "both"))
            print(f"{Case(**row['case']).title():42} {peer:32} {numbers}")


def parse(arguments):
    parser = command_line.parser(__doc__, "gpu_mlstm", "standard,tokens,blocks,small,decode",
                                 "16x128x256,8x256x512 (NH, DQK, DV)")
    parser.add_argument("--gates", choices=["open", "normal"], default="open", help="N(-3,1) and N(3,1), or N(0,1)")
    return command_line.parse(parser, arguments)


def main(arguments=None):
    args = parse(arguments)
    operators = load_ours(args.library, args.device, args.dtype)
    absent = {}
    if args.peers:
        others, absent = peers.mlstm_operators(args.device)
        operators += command_line.wanted_peers(others, args)
    for name, reason in absent.items():
        print(f"not here: {name} ({reason})")
    report = {"machine": gpu_machine(args.device), "packages": peers.versions(), "absent": absent,
              "dtype": str(args.dtype), "gates": args.gates, "hopper": os.environ.get("XLSTM_HOPPER", "")}
    print("relative errors against float64")
    shapes = [(16, 16), (16, 32)] if args.tiny else sorted({(dqk, dv) for _, dqk, dv in command_line.wanted_heads(HEADS, args)})
    report["checks"], bad = check_all(operators, shapes, args.dtype, args.device, 96 if args.tiny else 512)
    report["limits"] = limits = rooflines(args.device, args.effort, args.tiny)
    print(f"\ncopy {limits['copy']['gb_per_s']:.4g} GB/s, product of {limits['product']['edge']}^3 "
          f"{limits['product']['tflop_per_s']:.4g} TFLOP/s")
    report["cases"] = []
    # A wrong operator's speed is no result: nothing is timed then.
    waiting = [] if bad else [case for case in cases(args.suites, args.tiny)
                              if command_line.wanted_heads([(case.heads, case.dqk, case.dv)], args)]
    while waiting and waiting[0].suite == "standard":
        report["cases"].append(time_case(waiting.pop(0), operators, args, limits))
        write_report(args.out / f"{args.name}.json", report)
    if "decode" in args.suites and not bad:
        report["steps"] = time_steps(args, limits, args.tiny)
        bad += report["steps"]["bad"]
    while waiting and time.monotonic() < args.end:
        report["cases"].append(time_case(waiting.pop(0), operators, args, limits))
        write_report(args.out / f"{args.name}.json", report)
    report["skipped"] = [case.title() for case in waiting]
    bad += [f"{Case(**row['case']).title()}: {name}: {result['failed']}" for row in report["cases"]
            for name, result in row["times"].items() if name.startswith(OURS) and "failed" in result]
    ran = [name for row in report["cases"] for r in row["times"].values() for name in r.get("kernels_ms", {})]
    if ran and "sm_90a" in operators[0].name and not any("_sm90" in name for name in ran):
        bad.append("no sm_90a kernel ran")
    print_ratios(report)
    return command_line.finish(report, bad, args, plot)


if __name__ == "__main__":
    sys.exit(main())
