"""The part of gpu_ops.py that the operators around the cells are: causal_conv1d, the norms, block_linear, mlstm_step_inputs,
linear_int8 and linear_cross_entropy, small cases of each way through their kernels against the same in float64 on the CPU.
tests/python/test_pointwise_cuda.py has more of them; these run under compute-sanitizer, too."""

from dataclasses import dataclass

import torch

from gpu_ops_slstm import relative_error

# Largest ||got - wanted|| / ||wanted||, twice as in gpu_ops.LIMITS.
LIMITS = {torch.bfloat16: (5e-3, 5e-3), torch.float16: (2e-3, 2e-3), torch.float32: (2e-5, 2e-5)}
ROWS = (2, 37)


def conv(channels, width):
    reset = torch.arange(ROWS[0] * ROWS[1]).view(ROWS) % 23 == 11
    sizes = [(*ROWS, channels), (channels, width), (channels,), (ROWS[0], width - 1, channels)]
    return sizes, lambda *given: torch.ops.xlstm.causal_conv1d(*given, reset=reset.to(given[0].device), silu=True)


def norm(heads, dim):
    rows, channels = (*ROWS, heads * dim), (heads * dim,)
    sizes = [(*ROWS, heads, dim), channels, channels, rows, channels, rows]
    return sizes, lambda *given: [torch.ops.xlstm.headwise_norm(*given)]


def residual(dim):
    return [(*ROWS, dim), (*ROWS, dim), (dim,), (dim,)], torch.ops.xlstm.residual_norm


def block(blocks, size):
    channels = blocks * size
    sizes = [(*ROWS, channels), (blocks, size, size), (channels,)]
    return sizes, lambda *given: [torch.ops.xlstm.block_linear(*given)]


def step_inputs(channels, size, width, heads):
    """Without gradients; the window is a result, too."""
    sizes = [(ROWS[1], channels), (channels, width), (channels,), *[(channels // size, size, size), (channels,)] * 3]
    sizes += [*[(heads, 3 * channels), (heads,)] * 2, (ROWS[1], width - 1, channels)]

    def run(*given):
        with torch.no_grad():
            window = given[-1].clone()
            return [*torch.ops.xlstm.mlstm_step_inputs(*given[:-1], window), window]

    return sizes, run


def int8(rows, columns):
    sizes = [(rows, columns), (37,)]
    weight = torch.ops.xlstm.quantize_int8(torch.randn(37, columns, generator=torch.Generator().manual_seed(columns)))
    return sizes, lambda x, bias: [torch.ops.xlstm.linear_int8(x, weight.to(x.device), bias)]


def entropy(vocab):
    target = torch.arange(ROWS[0] * ROWS[1]).view(ROWS) * 7 % vocab
    target[0, 3:9] = -100
    run = lambda x, w: [torch.ops.xlstm.linear_cross_entropy(x, w, target.to(x.device), soft_cap=5.0)]  # noqa: E731
    return [(*ROWS, 8), (vocab, 8)], run


# 16 bytes at a time and number by number; rows of one group of threads, of a whole block, and longer than its registers hold.
ALL = [(conv, (40, 4)), (conv, (33, 7)), (norm, (2, 40)), (norm, (3, 33)), (residual, (2100,)), (residual, (4200,)),
       (block, (16, 4)), (block, (8, 8)), (step_inputs, (80, 2, 8, 1)), (step_inputs, (2200, 4, 4, 7)),
       (step_inputs, (64, 8, 3, 20)), (int8, (1, 640)), (int8, (5, 33)), (int8, (11, 80)), (entropy, (40,)), (entropy, (37,))]


@dataclass(frozen=True)
class Case:
    make: object
    sizes: tuple
    dtype: torch.dtype

    def title(self):
        return f"{self.make.__name__} {self.sizes} {str(self.dtype).removeprefix('torch.')}"


def cases(small=False):
    for dtype in LIMITS:
        if not (small and dtype == torch.float16):
            yield from (Case(*each, dtype) for each in ALL)


def compare(case, device, seed):
    """name -> relative error of every output and gradient."""
    generator = torch.Generator().manual_seed(seed)
    sizes, function = case.make(*case.sizes)
    inputs = [torch.randn(*s, generator=generator).to(case.dtype) for s in sizes]

    def run(tensors, weights):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        weights = weights or [torch.randn(o.shape, generator=generator).to(o) for o in out]
        upstream = [w.to(o) for w, o in zip(weights, out)]
        gradients = torch.autograd.grad(out, leaves, upstream) if out[0].requires_grad else []
        named = {f"y{i}": o for i, o in enumerate(out)} | {f"d{i}": g for i, g in enumerate(gradients)}
        return named, weights

    got, weights = run([x.to(device) for x in inputs], None)
    wanted, _ = run([x.double() for x in inputs], weights)
    return {name: relative_error(got[name], wanted[name]) for name in wanted}
