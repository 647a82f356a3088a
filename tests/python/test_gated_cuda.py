"""gated_linear_attention on a GPU: against its definition in float64 on the CPU, and in CUDA graphs, on other streams, by
torch's contract. Skipped without one."""


import pytest
import torch

from cuda_paths import generic_path
from test_gated_ops import NAMES, SIZES, arguments, gated_loop, leaves, resets

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = "cuda"
operator = torch.ops.xlstm.gated_linear_attention
backward = torch.ops.xlstm.gated_linear_attention_backward
# Relative errors in norm. float64 and heads beyond 1024 run in chunks of ATen calls.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-3}
RESULTS = ("h", "state", *(f"d{name}" for name in NAMES))


def make(sizes, dtype, decay="mild", bonus=True, state=True):
    """Arguments on the CPU, in the number types of a call."""
    inputs = arguments(sizes, decay, bonus, state, dtype)
    if state:
        inputs[5] = inputs[5].to(torch.promote_types(dtype, torch.float32))
    return inputs


def to_device(inputs):
    return [x if x is None else x.to(DEVICE) for x in inputs]


def weights_of(inputs):
    """Of h and of the state, on the GPU."""
    batch, _, heads, dk = inputs[0].shape
    torch.manual_seed(3)
    state = torch.randn(batch, heads, dk, inputs[2].shape[-1])
    return [torch.randn(inputs[2].shape).to(DEVICE, inputs[2].dtype),
            state.to(DEVICE, torch.promote_types(inputs[0].dtype, torch.float32))]


def run(inputs, weights, **options):
    """h, the state and the gradients of all that is given."""
    given = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = operator(*given, **options)
    return [*out, *torch.autograd.grad(out, [x for x in given if x is not None], weights)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(inputs, reset=None):
    """The GPU against the definition in float64, from the same rounded arguments."""
    place, dtype = to_device(inputs), inputs[0].dtype
    weights = weights_of(place)
    got = run(place, weights, reset=None if reset is None else reset.to(DEVICE))
    loop = leaves([x if x is None else x.double() for x in inputs])
    out = gated_loop(*loop, reset=reset)
    wanted = [*out, *torch.autograd.grad(out, [x for x in loop if x is not None], [w.double().cpu() for w in weights])]
    names = [*RESULTS[:2], *(f"d{name}" for name, x in zip(NAMES, inputs) if x is not None)]
    read = (loop[0] * wanted[2]).norm()  # dg is a difference of sums of q dq and k dk
    for name, x, y in zip(names, got, wanted, strict=True):
        assert torch.isfinite(x).all() and x.is_contiguous(), name
        assert (x.cpu().double() - y).norm() <= TOLERANCE[dtype] * (y.norm() + (read if name == "dg" else 0)), name


@pytest.mark.parametrize("sizes", [*SIZES, (2, 300, 2, 128, 256), (1, 40, 1, 1024, 8), (1, 5, 1, 1030, 8)])
@pytest.mark.parametrize("decay", ["mild", "strong", "none"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_float64(sizes, decay, bonus, dtype):
    check(make(sizes, dtype, decay, bonus), resets(*sizes[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_state_and_resets(dtype):
    check(make((2, 33, 2, 17, 20), dtype, bonus=False, state=False))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bonus", [False, True])
def test_kernels_and_generic_path_agree(bonus, dtype):
    inputs = make((2, 70, 2, 24, 40), dtype, bonus=bonus)
    check(inputs, resets(2, 70))
    with generic_path():
        check(inputs, resets(2, 70))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bonus", [False, True])
def test_a_gate_of_minus_infinity_has_no_gradient(bonus, dtype):
    inputs = make((2, 40, 2, 8, 12), dtype, bonus=bonus)
    inputs[3][:, 9] = -float("inf")
    place = to_device(inputs)
    results = run(place, weights_of(place))
    assert all(torch.isfinite(x).all() for x in results)
    assert (results[RESULTS.index("dg")][:, 9] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(2, 0, 2, 8, 12), (0, 5, 2, 8, 12), (2, 5, 0, 8, 12), (2, 5, 2, 0, 12), (2, 5, 2, 8, 0)])
def test_zero_sizes(sizes, dtype):
    for bonus in (False, True):
        inputs = to_device(make(sizes, dtype, bonus=bonus))
        weights = weights_of(inputs)
        h, state, *gradients = run(inputs, weights)
        assert torch.equal(h, torch.zeros_like(inputs[2])) and torch.equal(state, inputs[5])
        assert all((x == 0).all() for x in gradients[:-1]) and torch.equal(gradients[-1], weights[1])
        assert state.numel() == 0 or gradients[-1].data_ptr() != weights[1].data_ptr()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_inputs(dtype):
    inputs = to_device(make((2, 70, 4, 32, 64), dtype))
    reset = resets(2, 70).to(DEVICE)
    weights = weights_of(inputs)
    expected = run(inputs, weights, reset=reset)
    spread = lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]  # noqa: E731
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    parts = torch.cat(inputs[:4], -1).split([32, 32, 64, 32], -1)
    wide = torch.stack([reset, ~reset], -1)[..., 0]
    for tokens in (moved, [spread(x) for x in inputs[:4]], parts):
        given = [*tokens, *(spread(x) for x in inputs[4:])]
        assert not any(x.is_contiguous() for x in given)
        assert equal(run(given, [spread(w) for w in weights], reset=wide), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 70, 2, 24, 40), (1, 33, 3, 7, 5)])
def test_same_bits_every_time(sizes, dtype):
    inputs = to_device(make(sizes, dtype))
    weights, reset = weights_of(inputs), resets(*sizes[:2]).to(DEVICE)
    first = run(inputs, weights, reset=reset)
    assert all(equal(run(inputs, weights, reset=reset), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_does_not_wait(dtype):
    inputs = to_device(make((2, 70, 2, 24, 40), dtype))
    weights, reset = weights_of(inputs), resets(2, 70).to(DEVICE)
    run(inputs, weights, reset=reset)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, weights, reset=reset)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 70, 2, 24, 40), (1, 33, 3, 7, 5)])
@pytest.mark.parametrize("bonus", [False, True])
def test_in_a_cuda_graph(sizes, dtype, bonus):
    inputs = to_device(make(sizes, dtype, bonus=bonus))
    weights, reset = weights_of(inputs), resets(*sizes[:2]).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, weights, reset=reset)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, weights, reset=reset)
    for x in inputs:
        if x is not None:
            x.mul_(0.5)
    reset[:, 3] = True
    graph.replay()
    assert equal(captured, run(inputs, weights, reset=reset))


def test_other_streams_and_devices():
    inputs = to_device(make((2, 130, 2, 64, 64), torch.bfloat16))
    weights, reset = weights_of(inputs), resets(2, 130).to(DEVICE)
    expected = run(inputs, weights, reset=reset)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = run(inputs, weights, reset=reset)
    torch.cuda.current_stream().wait_stream(stream)
    assert equal(ours, expected)
    if torch.cuda.device_count() > 1:
        ours = run([x.to("cuda:1") for x in inputs], [w.to("cuda:1") for w in weights], reset=reset.to("cuda:1"))
        assert ours[0].device == torch.device("cuda:1")
        assert equal([x.cpu() for x in ours], [x.cpu() for x in expected])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bonus", [False, True])
def test_opcheck(bonus, dtype):
    inputs = to_device(make((2, 7, 2, 6, 5), dtype, bonus=bonus))  # widths that the kernels pad
    reset = resets(2, 7).to(DEVICE)
    torch.library.opcheck(operator.default, tuple(leaves(inputs)), {"reset": reset})
    torch.library.opcheck(backward.default, (*weights_of(inputs), *inputs), {"reset": reset, "scale": None})


@pytest.mark.parametrize("name", [*NAMES[1:], "reset"])
def test_tensors_of_another_device_are_refused(name):
    inputs = to_device(make((2, 7, 2, 16, 16), torch.float32))
    given = dict(zip(NAMES, inputs)) | {"reset": resets(2, 7).to(DEVICE)}
    given[name] = given[name].cpu()
    with pytest.raises(RuntimeError, match=f"gated_linear_attention: {name}: expected device cuda:0, got cpu"):
        operator(**given)
