"""The operators block_linear and linear_cross_entropy, and what holds for all of the operators around the cells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pointwise import (
    DTYPES, assert_no_worse, block_by_aten, conv_by_aten, entropy_by_aten, entropy_inputs, norm_by_aten, norm_inputs,
    norm_ours, ops, randn, residual_by_aten, residual_inputs, residual_ours, run_with_grads)


BLOCKS = [(5, 4, 4), (16, 4, 4), (33, 2, 2), (9, 8, 8), (3, 16, 16), (7, 3, 5), (2, 16, 1), (4, 1, 12), (1, 1, 1),
          (4, 13, 13), (3, 17, 9), (4, 64, 64), (2, 40, 33)]


@pytest.mark.parametrize("blocks,out,width", BLOCKS)
def test_block_linear_equals_einsum(blocks, out, width):
    for rows in [(2, 3), (1,), (300,), (0, 2)]:
        inputs = [randn(*rows, blocks * width), randn(blocks, out, width), randn(blocks * out)]
        for used in (inputs, inputs[:2]):
            ours, aten = run_with_grads(ops.block_linear, used), run_with_grads(block_by_aten, used)
            for got, want in zip(ours, aten):
                torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("blocks,out,width", [(3, 4, 4), (2, 3, 5), (2, 17, 3)])
def test_block_linear_gradcheck_on_views(blocks, out, width):
    c = blocks * width
    up, w, b = randn(2, 4, 2 * c, grad=True), randn(blocks, out, width, grad=True), randn(blocks * out, grad=True)
    assert torch.autograd.gradcheck(lambda u, w, b: ops.block_linear(u[..., c:], w, b), (up, w, b))
    assert torch.autograd.gradcheck(lambda u, w, b: ops.block_linear(u[:, 1:3, :c], w, b), (up, w, b))
    y = ops.block_linear(up[:1, :1, :c].expand(3, 2, c), w)
    torch.testing.assert_close(y, block_by_aten(up[:1, :1, :c], w).expand_as(y))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("sizes", [((3, 50), 20, 37), ((1,), 1, 1), ((2500,), 8, 130), ((130,), 4, 70001)])
def test_entropy_equals_aten(reduction, soft_cap, sizes):
    for ignored in (-1.0, 0.2):
        inputs, target = entropy_inputs(*sizes, ignored)
        keywords = dict(soft_cap=soft_cap, reduction=reduction)
        ours = run_with_grads(lambda x, w: ops.linear_cross_entropy(x, w, target, **keywords), inputs)
        aten = run_with_grads(lambda x, w: entropy_by_aten(x, w, target, **keywords), inputs)
        for got, want in zip(ours, aten):
            if target.ne(-100).any() or reduction != "mean":
                torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_entropy_gradcheck(reduction):
    (x, w), target = entropy_inputs((7,), 5, 11)
    x = x.t().contiguous().t()  # column-major
    f = lambda x, w: ops.linear_cross_entropy(x, w, target, soft_cap=3.0, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), w.requires_grad_()))
    for frozen in (0, 1):  # one of the two gradients alone
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, w))]
        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_entropy_of_ignored_rows_is_exactly_zero(reduction):
    (x, w), target = entropy_inputs()
    x[target == -100] = torch.nan
    loss, dx, dw = run_with_grads(lambda x, w: ops.linear_cross_entropy(x, w, target, reduction=reduction), [x, w])
    assert loss.isfinite().all() and dw.isfinite().all()
    assert not dx[target == -100].any()
    nothing = torch.full_like(target, -100)
    for result in run_with_grads(lambda x, w: ops.linear_cross_entropy(x, w, nothing, reduction=reduction), [x, w]):
        assert not result.any()
    empty = ops.linear_cross_entropy(x[:0], w, target[:0], reduction=reduction)
    assert not empty.any() and empty.shape == (target[:0].shape if reduction == "none" else ())


def test_entropy_of_extreme_logits():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e38, 1e38, 0.0], [0.0, 50.0, -50.0], [torch.nan, 0.0, 0.0]])
    target = torch.tensor([0, 1, 1, 1])
    ours, aten = (f(x, torch.eye(3), target, reduction="none") for f in (ops.linear_cross_entropy, entropy_by_aten))
    torch.testing.assert_close(ours, aten, equal_nan=True)


def test_entropy_half_gradients_survive_a_loss_scale():
    """Rows share 1/N; rounded before the loss scale came in, float16 gradients would vanish."""
    x, w = torch.randn(4000, 4), torch.randn(6, 4) * 0.1
    target = torch.randint(6, (4000,))
    grads = []
    for dtype in (torch.float16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        (ops.linear_cross_entropy(leaf, w.to(dtype), target) * 1e-3 * 65536).backward()
        grads.append(leaf.grad.float())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=2e-3)


def low_precision_cases():
    target = torch.randint(50, (200,), generator=torch.Generator().manual_seed(0))
    conv = [randn(2, 70, 40), randn(40, 4), randn(40), randn(2, 3, 40)]
    yield "conv", lambda *a: ops.causal_conv1d(*a, silu=True)[0], lambda *a: conv_by_aten(*a, silu=True)[0], conv
    yield "layer", norm_ours("layer", "silu"), norm_by_aten, norm_inputs()
    yield "rms", norm_ours("rms", "sigmoid"), lambda *a: norm_by_aten(*a, kind="rms", act="sigmoid"), norm_inputs()
    for kind in ("layer", "rms"):
        ours, aten = (lambda *a, f=f, kind=kind: f(*a, kind=kind) for f in (residual_ours, residual_by_aten))
        yield f"residual {kind}", ours, aten, residual_inputs((90,), 64)
    for shape in [(16, 4, 4), (5, 3, 7), (2, 48, 64)]:
        block = [randn(100, shape[0] * shape[2]), randn(*shape), randn(shape[0] * shape[1])]
        yield f"block{shape}", ops.block_linear, block_by_aten, block
    yield ("entropy", lambda x, w: ops.linear_cross_entropy(x, w, target),
           lambda x, w: entropy_by_aten(x, w, target), [randn(200, 30), randn(50, 30)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,ours,aten,inputs", list(low_precision_cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_low_precision(name, ours, aten, inputs, dtype):
    assert_no_worse(ours, aten, inputs, dtype)


OPCHECK_CASES = {
    "causal_conv1d": lambda r: ((r(2, 5, 6)[..., ::2], r(3, 4), r(3), r(2, 3, 3)), dict(silu=True)),
    "causal_conv1d packed": lambda r: (
        (r(1, 5, 6), r(6, 3)), dict(cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))),
    "headwise_norm": lambda r: ((r(2, 5, 2, 3), r(6), r(6), r(2, 5, 6), r(6), r(2, 5, 12)[..., 6:]), {}),
    "headwise_norm rms": lambda r: ((r(2, 5, 6),), dict(kind="rms")),
    "residual_norm": lambda r: ((r(2, 5, 6), r(2, 5, 12)[..., 6:], r(6), r(6)), {}),
    "residual_norm rms": lambda r: ((r(5, 6), r(5, 6)), dict(kind="rms")),
    "block_linear": lambda r: ((r(2, 5, 12), r(3, 2, 4), r(6)), {}),
    "block_linear large": lambda r: ((r(5, 36), r(2, 17, 18)), {}),
    "linear_cross_entropy": lambda r: ((r(2, 5, 3), r(7, 3), torch.arange(10).view(2, 5) % 7), dict(soft_cap=2.0)),
    "linear_cross_entropy none": lambda r: ((r(5, 3), r(7, 3), torch.arange(5)), dict(reduction="none")),
}


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck(name):
    args, keywords = OPCHECK_CASES[name](lambda *s: torch.randn(*s, requires_grad=True))
    torch.library.opcheck(getattr(ops, name.split()[0]).default, args, keywords)


def test_opcheck_backward_and_step():
    r = torch.randn
    check = torch.library.opcheck
    none = dict(reset=None, cu_seqlens=None, silu=True)
    check(ops.causal_conv1d_backward.default, (r(2, 5, 3), None, r(2, 5, 3), r(3, 4), r(3), r(2, 3, 3)), none)
    check(ops.causal_conv1d_backward.default, (None, r(2, 3, 3), r(2, 5, 3), r(3, 4), None, None), none)
    check(ops.causal_conv1d_step.default, (r(2, 3), r(3, 4), r(3), r(2, 3, 3)))
    norm = dict(eps=1e-5, kind="layer", gate_activation="silu")
    check(ops.headwise_norm_backward.default, (r(5, 6), r(5, 2, 3), r(6), None, r(5, 6), r(6), r(5, 6)), norm)
    check(ops.headwise_norm_backward.default, (r(5, 6), r(5, 2, 3), None, None, None, None, None), norm)
    norm = dict(eps=1e-5, kind="rms")
    check(ops.residual_norm_backward.default, (r(5, 6), r(5, 6), r(5, 6), r(6), r(6)), norm)
    check(ops.residual_norm_backward.default, (None, r(5, 6), r(5, 6), None, None), norm)
    check(ops.block_linear_backward.default, (r(5, 6), r(5, 12), r(3, 2, 4)), dict(has_bias=True))
    entropy = dict(ignore_index=-100, soft_cap=0.0)
    args = (r(5, 3), r(7, 3), torch.arange(5))
    for need in (True, False):
        check(ops.linear_cross_entropy_forward.default, args,
              dict(entropy, reduction="mean", need_dx=need, need_dweight=not need))
    check(ops.linear_cross_entropy_backward.default, (r(()), *args, r(5, 3), None), dict(entropy, reduction="sum"))
    check(ops.linear_cross_entropy_backward.default, (r(5), *args, None, None), dict(entropy, reduction="none"))


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_second_derivative_is_a_clear_error(name):
    args, keywords = OPCHECK_CASES[name](lambda *s: torch.randn(*s, requires_grad=True))
    outputs = getattr(ops, name.split()[0])(*args, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (first,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name.split()[0]}_backward is not implemented"):
        first.square().sum().backward()


def test_repeats_and_thread_counts_agree_bitwise():
    """Sums of weight gradients have one order, whatever the number of threads (GEMMs are the BLAS's affair)."""
    conv = [randn(3, 300, 40), randn(40, 4), randn(40), randn(3, 3, 40)]
    block = [randn(900, 64), randn(16, 4, 4), randn(64)]
    cases = [
        (lambda *a: ops.causal_conv1d(*a, silu=True)[0], conv),
        (ops.headwise_norm, norm_inputs((900,))),
        (residual_ours, residual_inputs((900,))),
        (ops.block_linear, block),
    ]
    threads = torch.get_num_threads()
    try:
        for function, inputs in cases:
            inputs = [x.float() for x in inputs]
            runs = []
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                runs.append(run_with_grads(function, inputs))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
    finally:
        torch.set_num_threads(threads)
    (x, w), target = entropy_inputs()
    entropy = lambda x, w: ops.linear_cross_entropy(x, w, target)  # noqa: E731
    for a, b in zip(run_with_grads(entropy, [x.float(), w.float()]), run_with_grads(entropy, [x.float(), w.float()])):
        assert torch.equal(a, b)


def test_autocast():
    x, w = torch.randn(6, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    head, target = torch.randn(9, 12, requires_grad=True), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.block_linear(x, w)
        assert y.dtype == torch.bfloat16
        y = ops.headwise_norm(y[:, None], torch.ones(12))
        assert y.dtype == torch.bfloat16
        y = ops.causal_conv1d(y[None], torch.randn(12, 4))[0]
        assert y.dtype == torch.bfloat16
        loss = ops.linear_cross_entropy(y[0], head, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == head.grad.dtype == torch.float32


def test_compiles_whole():
    def function(x, conv, w, norm, head, target):
        y = ops.causal_conv1d(x, conv, silu=True)[0]
        y = ops.block_linear(y, w)
        y = ops.headwise_norm(y.unflatten(-1, (2, 6)), norm, gate=x)
        return ops.linear_cross_entropy(y, head, target)

    inputs = [randn(2, 5, 12), randn(12, 4), randn(3, 4, 4), randn(12), randn(9, 12)]
    target = torch.arange(10).view(2, 5) % 9
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = run_with_grads(lambda *a: function(*a, target), inputs)
    for got, expected in zip(run_with_grads(lambda *a: compiled(*a, target), inputs), want):
        torch.testing.assert_close(got, expected)


x3, w24 = torch.zeros(2, 3, 4), torch.zeros(4, 2)
ERRORS = [
    (lambda: ops.causal_conv1d(x3[0], w24), r"x: expected \(B,T,C\)"),
    (lambda: ops.causal_conv1d(x3, torch.zeros(5, 4)), r"weight: expected \(C,W\) = \[4, 4\], got \[5, 4\]"),
    (lambda: ops.causal_conv1d(x3, torch.zeros(4, 9)), "width W of 2 to 8, got 9"),
    (lambda: ops.causal_conv1d(x3, w24, torch.zeros(3)), "bias: expected"),
    (lambda: ops.causal_conv1d(x3, w24, None, torch.zeros(2, 2, 4)), r"state0: expected .* = \[2, 1, 4\], got \[2, 2, 4\]"),
    (lambda: ops.causal_conv1d(x3, w24, reset=torch.zeros(2, 3)), "reset: expected dtype Bool, got Float"),
    (lambda: ops.causal_conv1d(x3, w24, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)), "expected B = 1"),
    (lambda: ops.causal_conv1d(x3[:1], w24, cu_seqlens=torch.tensor([0.0, 3.0])), "cu_seqlens: expected int32 or int64, got Float"),
    (lambda: ops.causal_conv1d(x3[:1], w24, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)), "from 0 to T = 3"),
    (lambda: ops.causal_conv1d(x3[:1], w24, cu_seqlens=torch.tensor([0, 4, 3], dtype=torch.int32)), "4 before 3"),
    (lambda: ops.causal_conv1d(x3.int(), w24), "x: expected float32, float64, bfloat16 or float16, got Int"),
    (lambda: ops.causal_conv1d_step(x3[0], w24, None, torch.zeros(3, 1, 3)), "state: expected"),
    (lambda: ops.headwise_norm(x3, torch.zeros(11)), r"weight: expected \(NH\*DH\) = \[12\], got \[11\]"),
    (lambda: ops.headwise_norm(x3, skip=torch.zeros(2, 12)), "skip and skip_weight come together, got only skip"),
    (lambda: ops.headwise_norm(x3, gate=torch.zeros(3, 12)), r"gate: expected .* = \[2, 12\], got \[3, 12\]"),
    (lambda: ops.headwise_norm(x3, kind="batch"), 'kind: expected "layer" or "rms", got "batch"'),
    (lambda: ops.headwise_norm(x3, gate_activation="tanh"), "gate_activation: expected"),
    (lambda: ops.headwise_norm(torch.zeros(3)), r"expected \(...,NH,DH\)"),
    (lambda: ops.residual_norm(x3, x3[0]), r"branch: expected x's shape = \[2, 3, 4\], got \[3, 4\]"),
    (lambda: ops.residual_norm(x3, x3.int()), "residual_norm: branch: expected float32, .* got Int"),
    (lambda: ops.residual_norm(x3, x3, torch.zeros(5)), r"residual_norm: weight: expected .* = \[4\], got \[5\]"),
    (lambda: ops.residual_norm(x3, x3, kind="batch"), 'residual_norm: kind: expected "layer" or "rms", got "batch"'),
    (lambda: ops.block_linear(x3, torch.zeros(2, 3, 3)), r"NB\*I = 6 .* got shape \[2, 3, 4\]"),
    (lambda: ops.block_linear(x3, torch.zeros(2, 3, 2).double()), "weight: expected dtype Float, got Double"),
    (lambda: ops.block_linear(x3, torch.zeros(2, 3, 2), torch.zeros(5)), r"bias: expected \(NB\*O\) = \[6\], got \[5\]"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.tensor([[0, 1, 2], [3, 7, 0]])),
     "target: expected 0 to 4 or ignore_index -100, got 7 at position 4"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 3), torch.zeros(2, 3).long()), r"weight: expected \(V,D\)"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.zeros(2, 3)), "target: expected dtype Long, got Float"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.zeros(2, 3).long(), reduction="max"), "reduction:"),
    (lambda: ops.linear_cross_entropy(x3, torch.zeros(5, 4), torch.zeros(2, 3).long(), soft_cap=-1.0), "soft_cap:"),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_name_argument_expected_and_got(case):
    call, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The kernels of lesser machines give the same results."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("already inside such a run")
    tests = "documents_equal or low_precision or optional_arguments or einsum and (2-2 or 4-4 or 8-8)"
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    files = [str(Path(__file__).with_name(name)) for name in ("test_causal_conv1d.py", "test_norms.py", Path(__file__).name)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
