"""torch.ops.xlstm.slstm on a GPU: CUDA graphs, no waiting for the device, the same bits every time, float64, autocast. Values
and gradients against float64: scripts/gpu_ops.py. Skipped without a GPU."""

import pytest
import torch

import libxlstm  # noqa: F401  registers the operators

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

slstm = torch.ops.xlstm.slstm
SIZES = [(3, 40, 2, 64), (2, 40, 1, 200), (2, 6, 1, 1040)]  # in one block, across blocks, step by step
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(batch, time, heads, dh, dtype, states=True, seed=0):
    """wx, r, b, y0, c0, n0, m0 on the GPU; leaves but for m0."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *sizes: torch.randn(*sizes, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = [random(batch, time, 4, heads, dh), 0.6 * dh**-0.5 * random(4, heads, dh, dh), random(4, heads, dh)]
    state = torch.promote_types(dtype, torch.float32)
    given = [random(batch, heads, dh).abs() + 0.3 for _ in range(4)] if states else []
    leaves = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    return leaves + [x.to("cuda", state).requires_grad_(i < 3) for i, x in enumerate(given)]


def run(inputs, **options):
    """Outputs and gradients of all inputs but m0."""
    y, y_last, c, n, m = slstm(*inputs, **options)
    leaves = [x for x in inputs if x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel(), device="cuda").view_as(x).to(x.dtype) for x in (y, y_last, c)]
    return [y, y_last, c, n, m, *torch.autograd.grad([y, y_last, c], leaves, weights)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(sizes, dtype):
    inputs = make(*sizes, dtype)
    first = run(inputs)
    assert all(torch.isfinite(x).all() for x in first)
    assert all(equal(first, run(inputs)) for _ in range(3))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("recompute", [False, True])
def test_in_a_cuda_graph(sizes, recompute):
    inputs = make(*sizes, torch.bfloat16)
    reset = torch.zeros(sizes[:2], dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, reset=reset, recompute=recompute)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, reset=reset, recompute=recompute)
    with torch.no_grad():
        inputs[0].copy_(inputs[0] * 0.5)
        reset[:, 3] = True
    graph.replay()
    assert equal(captured, run(inputs, reset=reset, recompute=recompute))


@pytest.mark.parametrize("packed", [False, True])
def test_the_host_does_not_wait(packed):
    """Packed sequences neither, where a persistent kernel takes them."""
    inputs = make(1, 40, 2, 64, torch.bfloat16, states=False)
    options = {"cu_seqlens": torch.tensor([0, 15, 15, 40], dtype=torch.int32, device="cuda")} if packed else {}
    run(inputs, **options)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("cell", ["slstm", "slstm_expf", "lstm"])
@pytest.mark.parametrize("recompute", [False, True])
def test_float64_equals_the_cpu(cell, recompute):
    inputs = make(2, 19, 2, 24, torch.float64)
    given = inputs[:5] if cell == "lstm" else inputs
    got = run(given, cell=cell, recompute=recompute)
    on_cpu = [x.detach().cpu().requires_grad_(x.requires_grad) for x in given]
    y, y_last, c, n, m = slstm(*on_cpu, cell=cell, recompute=recompute)
    weights = [torch.linspace(-1, 1, x.numel(), device="cuda").cpu().view_as(x).to(x.dtype) for x in (y, y_last, c)]
    wanted = [y, y_last, c, n, m, *torch.autograd.grad([y, y_last, c], [x for x in on_cpu if x.requires_grad], weights)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


def test_changing_one_document_changes_no_bit_of_another():
    inputs = make(2, 40, 2, 64, torch.bfloat16, states=False)
    reset = torch.zeros(2, 40, dtype=torch.bool, device="cuda")
    reset[:, 20] = True
    first = run(inputs, reset=reset)
    with torch.no_grad():
        inputs[0][:, :20].mul_(-1)
    second = run(inputs, reset=reset)
    assert torch.equal(first[0][:, 20:], second[0][:, 20:]) and torch.equal(first[5][:, 20:], second[5][:, 20:])
    assert not torch.equal(first[0][:, :20], second[0][:, :20])


def test_autocast():
    inputs = make(2, 20, 2, 64, torch.float32, states=False)
    with torch.autocast("cuda", torch.bfloat16):
        y = slstm(*inputs)[0]
    plain = slstm(inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2])[0]
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)


def test_no_tokens_and_no_sequences():
    for sizes in ((2, 0, 2, 16), (0, 5, 2, 16)):
        inputs = make(*sizes, torch.float32)
        results = run(inputs)
        assert results[0].shape == (sizes[0], sizes[1], *sizes[2:])
        assert torch.equal(results[1], inputs[3]) and torch.equal(results[2], inputs[4])
