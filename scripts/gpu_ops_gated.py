"""Gated linear attention's part of gpu_ops.py: cases, and a call on the GPU against the same in float64 on the CPU."""

from dataclasses import dataclass

import torch

from gpu_ops_slstm import relative_error

# Largest ||got - wanted|| / ||wanted||, twice as in gpu_ops.LIMITS.
LIMITS = {torch.bfloat16: (5e-3, 5e-3), torch.float16: (5e-3, 5e-3), torch.float32: (2e-5, 2e-5)}
NAMES = ("q", "k", "v", "g", "u", "state0")


@dataclass(frozen=True)
class Case:
    time: int
    dk: int
    dv: int
    dtype: torch.dtype = torch.bfloat16
    bonus: bool = False

    def title(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"gated T={self.time} ({self.dk},{self.dv}) {dtype}" + " bonus" * self.bonus


def cases(small=False):
    sizes = [(9, 24, 40)] if small else [(1, 16, 16), (70, 5, 7), (200, 64, 64), (131, 128, 256), (40, 1024, 8)]
    for dtype in LIMITS:
        for bonus in (False, True):
            yield from (Case(*each, dtype, bonus) for each in sizes)


def run(tensors, reset, weights):
    leaves = [x.detach().requires_grad_() if x is not None else None for x in tensors]
    out = torch.ops.xlstm.gated_linear_attention(*leaves, reset=reset)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(out, wanted, [w.to(o) for w, o in zip(weights, out)])
    names = [f"d{name}" for name, x in zip(NAMES, leaves) if x is not None]
    return dict(zip(("h", "state"), out)) | dict(zip(names, gradients))


def compare(case, device, seed):
    """name -> relative error of every output and gradient; that of dg, a difference of sums of q dq and k dk, beside these."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = 2, 2

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator)

    keys, values = (batch, case.time, heads, case.dk), (batch, case.time, heads, case.dv)
    tensors = [x.to(case.dtype) for x in (draw(*keys), draw(*keys), draw(*values), torch.nn.functional.logsigmoid(draw(*keys)))]
    tensors += [draw(heads, case.dk).to(case.dtype) if case.bonus else None, draw(batch, heads, case.dk, case.dv)]
    weights = [draw(*values).to(case.dtype), draw(batch, heads, case.dk, case.dv)]
    reset = torch.rand(keys[:2], generator=generator) < 0.1
    got = run([x if x is None else x.to(device) for x in tensors], reset.to(device), weights)
    wanted = run([x if x is None else x.double() for x in tensors], reset, weights)
    term = tensors[0].double() * wanted["dq"]
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    errors["dg"] = relative_error(got["dg"].cpu().double() + term, wanted["dg"] + term)
    return errors
