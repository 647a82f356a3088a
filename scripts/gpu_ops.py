"""mLSTM, sLSTM, gated linear attention and the operators around them on a GPU against float64 on the CPU. Needs torch and the
operators; exit 1 on a difference.

    python scripts/gpu_ops.py [--small] [--device cuda] [--json FILE] [--expect TEXT]

Forward, all gradients, final states and the decoding step: every kernel family (fused sweep, state and out kernels, time
segments; sLSTM within a block, across blocks, step by step), three number types, gates and cells, resets, packed sequences,
strided inputs, head sizes that are padded.
--small takes a few short cases, for compute-sanitizer. --expect: the profiler must see a kernel whose name contains TEXT
in a bfloat16 call with heads of (128,128). Prints one line per case that fails, and a summary.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]

import gpu_ops_gated  # noqa: E402
import gpu_ops_pointwise  # noqa: E402
import gpu_ops_slstm  # noqa: E402
from gpu_cases import ring_of  # noqa: E402
from gpu_ops_slstm import relative_error  # noqa: E402

NAMES = ("q", "k", "v", "igate", "fgate")
# Largest ||got - wanted|| / ||wanted||: usual, and of the forget gate and n0, whose gradients are sums over tokens in
# which much cancels.
SUMS = ("dfgate", "dn0")
# A result that is a difference of nearly equal numbers moves much when its inputs are rounded a little differently, and no
# kernel can be closer than a few times as much. h, the scores and the gradients of h are rounded on the way; those of the
# forget gates are sums of such numbers over tokens.
ROUNDINGS = {"dfgate": 6.0}
USUAL_ROUNDINGS = 4.0
LIMITS = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2), torch.float32: (2e-5, 2e-5)}


@dataclass(frozen=True)
class Case:
    time: int
    dqk: int
    dv: int
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    heads: int = 2
    sigmoid: bool = False
    normalize: bool = True
    states: bool = False
    reset: bool = False
    packed: tuple = ()  # lengths of the sequences in one row
    strided: bool = False
    chunk_size: int = 0

    def title(self):
        said = [f"T={self.time} ({self.dqk},{self.dv}) {str(self.dtype).removeprefix('torch.')} B={self.batch}"]
        said += [word for word in ("sigmoid", "states", "reset", "strided") if getattr(self, word)]
        said += ["no norm"] * (not self.normalize) + [f"packed {self.packed}"] * bool(self.packed)
        return " ".join(said + [f"chunk {self.chunk_size}"] * bool(self.chunk_size))


def all_cases():
    bf16, f16, f32 = LIMITS
    for dtype in LIMITS:
        for time in (1, 17, 63, 64, 65, 127, 200):
            yield Case(time, 64, 64, dtype)
            yield Case(time, 64, 128, dtype, states=True, sigmoid=time % 2 == 0)
        for dqk, dv in ((16, 16), (24, 80), (128, 128), (128, 256), (256, 128), (192, 192), (256, 512)):
            yield Case(200, dqk, dv, dtype, states=True)
            yield Case(129, dqk, dv, dtype, sigmoid=True, normalize=dqk != 128)
        yield Case(200, 128, 128, dtype, reset=True, states=True)
        yield Case(321, 64, 256, dtype, reset=True, sigmoid=True, strided=True)
        yield Case(331, 128, 64, dtype, batch=1, packed=(64, 1, 130, 136), states=True)
        yield Case(331, 256, 256, dtype, batch=1, packed=(64, 1, 130, 136), reset=True)
        # On sm_90a sequences' tails are cleared by a consumer that has no rows of its own, and in a wide sweep.
        yield Case(331, 64, 320, dtype, batch=1, packed=(64, 1, 130, 136), states=True)
        yield Case(331, 128, 256, dtype, batch=1, packed=(64, 1, 130, 136))
        yield Case(4096, 64, 64, dtype, batch=1, heads=1, states=True)  # cut into time segments
        yield Case(3000, 256, 256, dtype, batch=1, heads=1, states=True)
        yield Case(300, 256, 256, dtype, chunk_size=64)
    for dims in ((384, 384), (512, 512), (1024, 1024), (1280, 1280)):
        yield Case(130, *dims, bf16, batch=1, states=True)
        yield Case(70, *dims, f32, batch=1, heads=1)


def small_cases():
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(130, 64, 64, dtype, batch=1, states=True)
        yield Case(70, 128, 128, dtype, batch=1, reset=True, sigmoid=True)
        yield Case(130, 256, 192, dtype, batch=1, heads=1, states=True)
        yield Case(70, 24, 80, dtype, batch=1, heads=1, strided=True)
        for dqk, dv in ((64, 64), (64, 320), (128, 256)):
            yield Case(131, dqk, dv, dtype, batch=1, heads=1, packed=(64, 1, 66))
        yield Case(600, 64, 64, dtype, batch=1, heads=1)  # segments


def make(case, seed):
    """q, k, v, igate, fgate, their states or None, weights of h and of the states; CPU, in the case's number type. Where
    float32's rounding may decide on which side of the normaliser's bound a token lies, and so on gradients that jump there,
    they are drawn anew."""
    while True:
        drawn = draw_case(case, seed)
        if case.dtype == torch.bfloat16 or distance_from_bound(case, *drawn[:2]) > 1e-4:
            return drawn
        seed += 1000


def distance_from_bound(case, tensors, states):
    """The least of | |n . q| e^m - 1 | over the tokens: at 0 the divisor of h is no longer 1 and becomes |n . q| e^m."""
    if not case.normalize:
        return float("inf")
    q, k, v, igate, fgate = (x.double() for x in tensors)
    # With values of 1 the state C is n, and so small a scale leaves every token on one side: h is n . q e^m, scaled.
    tiny = 1e-12
    first = [] if states is None else [states[1].double().unsqueeze(-1), *(x.double() for x in states[1:])]
    options = options_of(case, "cpu") | {"scale": tiny * case.dqk**-0.5, "eps": 0.0}
    h = torch.ops.xlstm.mlstm_chunkwise(q, k, torch.ones_like(v[..., :1]), igate, fgate, *first, **options)[0]
    return (h.abs() / tiny - 1).abs().min().item()


def draw_case(case, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes, dtype=case.dtype):
        return torch.randn(*sizes, generator=generator).to(dtype)

    batch, time, heads = case.batch, case.time, case.heads
    tensors = [draw(batch, time, heads, width) for width in (case.dqk, case.dqk, case.dv)]
    tensors += [draw(batch, time, heads, dtype=torch.float32) + shift for shift in (-1.0, 2.0)]
    count = len(case.packed) or batch
    sizes = [(count, heads, case.dqk, case.dv), (count, heads, case.dqk), (count, heads)]
    states = [draw(*s, dtype=torch.float32) for s in sizes]
    weights = [draw(batch, time, heads, case.dv), *(draw(*s, dtype=torch.float32) for s in sizes[:2])]
    return tensors, states if case.states else None, weights


def options_of(case, device):
    options = {"input_gate": "sigmoid" if case.sigmoid else "exp", "normalize": case.normalize, "chunk_size": case.chunk_size}
    if case.reset:
        marks = torch.rand(case.batch, case.time, generator=torch.Generator().manual_seed(3)) < 0.03
        options["reset"] = marks.to(device)
    if case.packed:
        ends = torch.tensor([0, *case.packed]).cumsum(0)
        options["cu_seqlens"] = ends.to(torch.int32).to(device)
    return options


def run(case, tensors, states, weights, device, dtype=None):
    """name -> tensor: h, final states and all gradients, computed on the device (in float64 with dtype)."""
    place = [x.to(device=device, dtype=dtype or x.dtype) for x in tensors]
    if case.strided and dtype is None:  # (B,NH,T,D) in memory, and gates two numbers apart
        place = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in place[:3]] + [
            torch.stack([x, x], -1)[..., 0] for x in place[3:]]
    place = [x.detach().requires_grad_() for x in place]
    first = [] if states is None else [x.to(device=device, dtype=dtype or x.dtype) for x in states]
    first = [x.requires_grad_(i < 2) for i, x in enumerate(first)]
    weights = [x.to(device=device, dtype=dtype or x.dtype) for x in weights]
    h, c, n, m = torch.ops.xlstm.mlstm_chunkwise(*place, *first, **options_of(case, device))
    outputs = [h, c, n] if case.states else [h]
    gradients = torch.autograd.grad(outputs, place + first[:2], weights[: len(outputs)])
    names = [*NAMES, "c0", "n0"][: len(gradients)]
    return {"h": h, "c": c, "n": n, "m": m} | {f"d{name}": g for name, g in zip(names, gradients)}


def kernels_of(case, device):
    """Names of the GPU kernels of one call and its backward pass."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run(case, *make(case, seed=0), device)
    return {a.key for a in profiler.key_averages() if a.device_type == DeviceType.CUDA}


def compare(case, device, seed):
    tensors, states, weights = make(case, seed)
    got = run(case, tensors, states, weights, device)
    wanted = run(case, tensors, states, weights, "cpu", torch.float64)
    return {name: relative_error(got[name], wanted[name]) for name in wanted}


def rounded_again(tensors, dtype, seed):
    """Float64 numbers as they may be after one rounding more: to bfloat16, or to the 16 bits of the kernels' two planes."""
    generator = torch.Generator().manual_seed(seed)
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-17
    return [x.double() * (1 + unit * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)) for x in tensors]


def largest_error(name, limit, movement):
    """`movement`: how far one rounding of the inputs moves the result, relative to its size."""
    return max(limit, ROUNDINGS.get(name, USUAL_ROUNDINGS) * movement)


def movements(tensors, states, weights, dtype, run):
    """name -> the largest movement of every result in four trials; the gates and m, which are not rounded, stay as they are.
    run(tensors, states, weights) -> {name: result} in float64."""
    wanted, found = run(tensors, states, weights), {}
    count = len(weights)
    for trial in range(4):
        near = rounded_again([*tensors[:3], *weights, *states[:2]], dtype, seed=11 + trial)
        moved = run([*near[:3], *tensors[3:]], [*near[3 + count:], *states[2:]], near[3:3 + count])
        for name, result in moved.items():
            found[name] = max(found.get(name, 0.0), relative_error(result, wanted[name]))
    return found


def movements_of(case, seed):
    tensors, states, weights = make(case, seed)
    return movements(tensors, states or [], weights, case.dtype,
                     lambda t, s, w: run(case, t, s or None, w, "cpu", torch.float64))


def compare_step(dtype, dqk, dv, sigmoid, device, ring=0):
    """Decoding steps against the chunkwise form in float64: eight, or with a ring of so many tokens 40 lazy ones and a
    fold."""
    case = Case(40 if ring else 8, dqk, dv, dtype, states=True, sigmoid=sigmoid)
    tensors, states, _ = make(case, seed=5)
    gate = {"input_gate": "sigmoid" if sigmoid else "exp"}
    wanted = torch.ops.xlstm.mlstm_chunkwise(*(x.double() for x in (*tensors, *states)), **gate)
    place = [x.to(device) for x in tensors]
    state = [x.clone().to(device) for x in states]
    if ring:
        state += ring_of(place[1][:, 0], place[2][:, 0], ring)
    step = torch.ops.xlstm.mlstm_step_lazy if ring else torch.ops.xlstm.mlstm_step
    h = torch.stack([step(*(x[:, t] for x in place), *state, **gate) for t in range(case.time)], 1)
    if ring:
        torch.ops.xlstm.mlstm_fold(*state, **gate)
    return {name: relative_error(a, b) for name, a, b in zip("hcnm", (h, *state[:3]), wanted)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--expect", help="part of the name of a kernel that must run")
    args = parser.parse_args(arguments)
    import libxlstm  # noqa: F401  registers torch.ops.xlstm

    rows, failed, ill_conditioned = [], 0, 0
    if args.expect:
        names = kernels_of(Case(200, 128, 128), args.device)
        if not any(args.expect in name for name in names):
            print(f"FAIL no kernel named *{args.expect}* ran; these did: {', '.join(sorted(names)) or 'none'}")
            failed += 1

    def judge(title, dtype, compute, limits=LIMITS, moves=dict):
        """moves(): how far each result moves when the inputs are rounded a little differently."""
        nonlocal failed, ill_conditioned
        usual, sums = limits[dtype]
        try:
            errors = compute()
            beyond = {name: sums if name in SUMS else usual for name in errors}
            beyond = {name: limit for name, limit in beyond.items() if not errors[name] <= limit}
            moved = moves() if beyond else {}
            ill_conditioned += bool(moved)
            bad = [f"{name} {errors[name]:.1e}" for name, limit in beyond.items()
                   if not errors[name] <= largest_error(name, limit, moved.get(name, 0.0))]
        except Exception as error:
            errors, bad = {}, [f"{type(error).__name__}: {error}"]
        rows.append({"case": title, "errors": errors, "bad": bad})
        failed += bool(bad)
        if bad:
            print(f"FAIL {title}: {', '.join(bad)}", flush=True)

    for seed, case in enumerate(gpu_ops_gated.cases(args.small)):
        judge(case.title(), case.dtype, lambda c=case, s=seed: gpu_ops_gated.compare(c, args.device, s), gpu_ops_gated.LIMITS)
    for seed, case in enumerate(gpu_ops_pointwise.cases(args.small)):
        judge(case.title(), case.dtype, lambda c=case, s=seed: gpu_ops_pointwise.compare(c, args.device, s),
              gpu_ops_pointwise.LIMITS)
    for seed, case in enumerate(small_cases() if args.small else all_cases()):
        judge(case.title(), case.dtype, lambda c=case, s=seed: compare(c, args.device, s),
              moves=lambda c=case, s=seed: movements_of(c, s))
    sizes = [(64, 64)] if args.small else [(16, 16), (64, 64), (128, 256), (256, 512), (100, 72)]
    for dtype in LIMITS:
        for dqk, dv in sizes:
            for sigmoid in (False, True):
                for ring in (0, 5, 16):
                    judge(f"step ({dqk},{dv}) {dtype} {'sigmoid' if sigmoid else 'exp'} ring {ring}", dtype,
                          lambda d=dtype, a=dqk, x=dv, s=sigmoid, r=ring: compare_step(d, a, x, s, args.device, r))
    for seed, case in enumerate(gpu_ops_slstm.cases(args.small)):
        judge(case.title(), case.dtype, lambda c=case, s=seed: gpu_ops_slstm.compare(c, args.device, s), gpu_ops_slstm.LIMITS)
        if case.decode:
            judge("decoding " + case.title(), case.dtype,
                  lambda c=case, s=seed: gpu_ops_slstm.compare_decoding(c, args.device, s), gpu_ops_slstm.LIMITS)
    worst = {}
    for row in rows:
        for name, error in row["errors"].items():
            worst[name] = max(worst.get(name, 0.0), error)
    print("largest relative errors: " + "  ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    print(f"{len(rows)} cases, {failed} failed, {ill_conditioned} measured by what one rounding of the inputs moves")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    # Backward passes in this thread: torch's own ones let go of Python's objects a little after the results are there, and
    # where the interpreter ends meanwhile the process is terminated (seen once, under memcheck on a busy machine).
    torch.autograd.set_multithreading_enabled(False)
    sys.exit(main())
