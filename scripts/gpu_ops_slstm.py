"""The sLSTM's part of gpu_ops.py: cases, and a call on the GPU against the same in float64 on the CPU.

Low precision is compared with float64 of the same rounded inputs. What enters the recurrent product is y in bfloat16, or
with 16 significant bits, so that errors come back in every step: the limits are those of a run in ATen calls of the same
number type, twice (tests/ops/test_emulated_slstm.cpp holds the kernels to the same in the emulator).
"""

from dataclasses import dataclass

import torch

# Largest ||got - wanted|| / ||wanted||, twice as in gpu_ops.LIMITS.
LIMITS = {torch.bfloat16: (4e-2, 4e-2), torch.float16: (5e-3, 5e-3), torch.float32: (1e-4, 1e-4)}
CELLS = ("slstm", "slstm_expf", "lstm")
WORD_OF = {"states": "states", "reset": "reset", "recompute": "recompute", "cut": "cut", "float_parameters": "float r, b"}


@dataclass(frozen=True)
class Case:
    time: int
    dh: int
    dtype: torch.dtype = torch.bfloat16
    batch: int = 3
    heads: int = 2
    cell: str = "slstm"
    states: bool = False
    reset: bool = False
    packed: tuple = ()  # lengths of the sequences in one row
    gate_dim: int = 2  # where the gates stand in wx's memory
    recompute: bool = False
    clip: float = 0.0
    cut: bool = False
    float_parameters: bool = False
    decode: bool = False  # also token by token

    def title(self):
        dtype = str(self.dtype).removeprefix("torch.")
        said = [f"{self.cell} T={self.time} DH={self.dh} {dtype} B={self.batch} NH={self.heads}"]
        said += [word for name, word in WORD_OF.items() if getattr(self, name)]
        said += [f"packed {self.packed}"] * bool(self.packed) + [f"gates at {self.gate_dim}"] * (self.gate_dim != 2)
        return " ".join(said + [f"clip {self.clip}"] * bool(self.clip))


def cases(small=False):
    bf16, f16, f32 = LIMITS
    if small:
        for dtype in (bf16, f32):
            yield Case(19, 24, dtype, states=True, decode=True)
            yield Case(17, 64, dtype, reset=True, recompute=True)
            yield Case(18, 200, dtype, batch=1, heads=1)  # across blocks
            yield Case(3, 1040, dtype, batch=1, heads=1)  # no persistent kernel
            yield Case(33, 32, dtype, batch=1, packed=(16, 1, 16))
        return
    for dtype in LIMITS:
        for cell in CELLS:
            for dh in (16, 24, 64, 128, 200, 256):
                yield Case(70, dh, dtype, cell=cell, states=True, decode=dh in (24, 64, 200))
            yield Case(70, 64, dtype, cell=cell, reset=True, recompute=True, float_parameters=True)
            yield Case(8, 1040, dtype, batch=2, heads=1, cell=cell, states=True, reset=True, decode=True)
        for time in (1, 15, 16, 17, 33):
            yield Case(time, 64, dtype, batch=17, states=time % 2 == 0)
        for gate_dim in (0, 3, 4):
            yield Case(40, 48, dtype, gate_dim=gate_dim, reset=True)
        yield Case(131, 64, dtype, batch=1, packed=(64, 1, 0, 66), states=True)
        yield Case(131, 192, dtype, batch=1, packed=(64, 1, 0, 66), reset=True, recompute=True)
        yield Case(20, 1040, dtype, batch=1, heads=1, packed=(12, 0, 8), states=True)
        yield Case(40, 64, dtype, clip=0.1, states=True)
        yield Case(40, 64, dtype, cut=True, states=True)
        yield Case(40, 100, dtype, batch=40, heads=4)
    for dh in (384, 512, 768, 1024):
        yield Case(33, dh, bf16, batch=2, states=True)
    yield Case(300, 64, bf16, batch=2)


def make(case, seed):
    """wx, r, b, their states or None, weights of the outputs; CPU, in the case's number types."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes, dtype=case.dtype):
        return torch.randn(*sizes, generator=generator).to(dtype)

    sizes = [case.batch, case.time, case.heads, case.dh]
    sizes.insert(case.gate_dim, 4)
    wx = draw(*sizes).movedim(case.gate_dim, 2)
    parameter = torch.float32 if case.float_parameters else case.dtype
    r = (0.6 * case.dh**-0.5 * torch.randn(4, case.heads, case.dh, case.dh, generator=generator)).to(parameter)
    b = draw(4, case.heads, case.dh, dtype=parameter)
    count = len(case.packed) or case.batch
    states = [draw(count, case.heads, case.dh, dtype=torch.float32) for _ in range(4)]
    states[2] = states[2].abs() + 0.3
    weights = [draw(case.batch, case.time, case.heads, case.dh)]
    weights += [draw(count, case.heads, case.dh, dtype=torch.float32) for _ in range(3)]
    return [wx, r, b], states if case.states else None, weights


def options_of(case, device):
    options = {"cell": case.cell, "recompute": case.recompute, "recurrent_clip": case.clip, "recurrent_cut": case.cut}
    if case.reset:
        marks = torch.rand(case.batch, case.time, generator=torch.Generator().manual_seed(3)) < 0.1
        options["reset"] = marks.to(device)
    if case.packed:
        options["cu_seqlens"] = torch.tensor([0, *case.packed]).cumsum(0).to(torch.int32).to(device)
    return options


def run(case, tensors, states, weights, device, dtype=None):
    """name -> tensor: y, final states and all gradients, computed on the device (in float64 with dtype)."""

    def place(x):  # keeps the memory order
        return x.to(device=device, dtype=dtype or x.dtype).detach().requires_grad_()

    leaves = [place(x) for x in tensors]
    kept = 0 if states is None else 2 if case.cell == "lstm" else 3
    first = [place(x) for x in states or []]
    for x in first[kept:]:
        x.requires_grad_(False)
    given = (first[:2] + [None, None]) if case.cell == "lstm" and first else first
    y, y_last, c, n, m = torch.ops.xlstm.slstm(*leaves, *given, **options_of(case, device))
    outputs = [y, y_last, c, n][: 1 + (0 if states is None else kept)]
    weights = [w.to(device=device, dtype=o.dtype) for w, o in zip(weights, outputs)]
    gradients = torch.autograd.grad(outputs, leaves + first[:kept], weights)
    results = {"y": y, "y_last": y_last, "c": c} | ({} if case.cell == "lstm" else {"n": n})
    return results | {f"d{name}": g for name, g in zip(("wx", "r", "b", "y0", "c0", "n0"), gradients)}


def relative_error(got, wanted):
    got, wanted = got.detach().cpu().double(), wanted.detach().double()
    if wanted.norm() == 0:
        return float(got.norm())
    error = (got - wanted).norm() / wanted.norm()
    return float(error) if torch.isfinite(error) else float("inf")


def compare(case, device, seed):
    """name -> relative error of every output and gradient."""
    tensors, states, weights = make(case, seed)
    got = run(case, tensors, states, weights, device)
    wanted = run(case, tensors, states, weights, "cpu", torch.float64)
    return {name: relative_error(got[name], wanted[name]) for name in wanted}


def compare_decoding(case, device, seed):
    """Token by token against the whole sequence in float64."""
    (wx, r, b), states, _ = make(case, seed)
    options = {"cell": case.cell}
    wanted = torch.ops.xlstm.slstm(*(x.double() for x in (wx, r, b, *(states or []))), **options)
    state = [x.to(device) for x in states or []]
    wx, r, b = (x.to(device) for x in (wx, r, b))
    parts = []
    for t in range(case.time):
        y, *state = torch.ops.xlstm.slstm(wx[:, t : t + 1], r, b, *state, **options)
        parts.append(y)
    return {name: relative_error(a, w) for name, a, w in zip(("y", "y_last", "c"), (torch.cat(parts, 1), *state), wanted)}
