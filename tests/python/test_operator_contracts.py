"""What operators promise beside their numbers: sizes are checked, documents and overlapping memory are kept apart,
recomputation and compilation see what they need."""

import pytest
import torch
from test_devices import OPERATORS, arguments
from test_forward_mode import OPERATORS as DIFFERENTIABLE
from torch.utils.checkpoint import checkpoint

import libxlstm

ops = torch.ops.xlstm
NAN = float("nan")


def real_call(operator):
    """Arguments that the operator takes on the CPU."""
    tensors, options = arguments(operator)
    if "cu_seqlens" in tensors:  # of the two ways to say where documents begin, one
        tensors["cu_seqlens"] = torch.tensor([0, 5], dtype=torch.int32)
        tensors["reset"] = None
    if operator == "slstm_forward":
        options = options | {"preactivations": False}
    if operator in ("linear_int8", "dequantize_int8"):
        tensors["weight"] = ops.quantize_int8(torch.zeros(tensors["weight"].size(0), 4))
    if operator == "slstm_backward":
        tensors["checkpoints"] = torch.zeros(1, 2, 1, 4, 4)
    return tensors, options


@pytest.mark.parametrize("operator", OPERATORS)
def test_sizes_are_checked(operator):
    """A kernel would read beyond the end of what is too short: every dimension of every tensor, backward operators too."""
    call = getattr(ops, operator)
    tensors, options = real_call(operator)
    call(**tensors, **options)
    for name, x in tensors.items():
        if x is None:
            continue
        for dim in set(range(x.dim())) - FREE.get((operator.removesuffix("_forward"), name), set()):
            other = x.narrow(dim, 0, x.size(dim) - 1) if x.size(dim) > 1 else torch.cat([x, x], dim)
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                call(**tensors | {name: other}, **options)


# Dimensions that may have any size: no other tensor has them, or none is read beside this one.
FREE = {("linear_cross_entropy", "weight"): {0}, ("linear_cross_entropy_backward", "weight"): {0},
        ("linear_cross_entropy_backward", "dx"): {0, 1, 2}, ("linear_cross_entropy_backward", "dweight"): {0, 1},
        ("block_linear", "x"): {0, 1}, ("linear_int8", "x"): {0, 1}, ("quantize_int8", "weight"): {0, 1},
        ("dequantize_int8", "weight"): {0}, ("slstm_backward", "gates"): {0, 1, 2, 3, 4}}


WITH_GRADIENTS = sorted(set(DIFFERENTIABLE) - {"mlstm_step", "mlstm_step_inputs", "causal_conv1d_step"})


@pytest.mark.parametrize("operator", WITH_GRADIENTS)
def test_recomputed_alone_in_the_backward_pass(operator):
    call, given = getattr(ops, operator), DIFFERENTIABLE[operator]()
    given = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]

    def run(*tensors):
        out = call(*tensors)
        return out[0] if isinstance(out, tuple) else out

    expected = torch.autograd.grad(run(*given).square().sum(), leaves)
    for reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(run, *given, use_reentrant=reentrant).square().sum().backward()
        for leaf, other in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, other, rtol=0, atol=0)


def check_compiled_autograd(loss, leaves):
    """loss() is recorded as it is, and its backward pass compiled."""
    expected = torch.autograd.grad(loss(), leaves)
    torch._dynamo.reset()
    recorded = loss()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(recorded.backward, backend="eager")()
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other)


@pytest.mark.parametrize("operator", [*WITH_GRADIENTS, "slstm as lstm"])
def test_compiled_autograd_takes_what_was_recorded(operator):
    name, *lstm = operator.split(" as ")
    given = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for x in DIFFERENTIABLE[name]()]

    def loss():
        out = getattr(ops, name)(*given, **{"cell": cell for cell in lstm})
        return sum(x.square().sum() for x in (out if isinstance(out, tuple) else [out]) if x.requires_grad)

    check_compiled_autograd(loss, [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad])


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_autograd_takes_blocks(autocast):
    torch.manual_seed(2)
    stack = libxlstm.BlockStack(embedding_dim=16, num_blocks=2, num_heads=2, slstm_at=[1])
    x = torch.randn(2, 9, 16, requires_grad=True)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return stack(x)[0].square().sum()

    check_compiled_autograd(loss, [x, *stack.parameters()])


def test_gated_scan_lets_nothing_past_a_reset():
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, 3] = reset[0, 0] = True
    x, a, state = torch.randn(2, 6, 5), torch.rand(2, 6, 5), torch.randn(2, 5)
    bad_x, bad_a, bad_state = x.clone(), a.clone(), state.clone()
    bad_x[:, 1], bad_a[:, 3], bad_state[0] = NAN, NAN, float("inf")
    clean, _ = ops.gated_scan(x, a, state, reset=reset)
    h, last = ops.gated_scan(bad_x, bad_a, bad_state, reset=reset)
    assert torch.equal(h[:, 3:], clean[:, 3:]) and torch.equal(h[0, 0], clean[0, 0]) and torch.equal(last, clean[:, -1])
    assert h[:, 1:3].isnan().all()
    given = [t.requires_grad_() for t in (x, a, state)]
    dh = torch.ones(2, 6, 5)
    expected = torch.autograd.grad(ops.gated_scan(*given, reset=reset)[0], given, dh)
    dh[:, 4] = NAN
    found = torch.autograd.grad(ops.gated_scan(x, bad_a.requires_grad_(), state, reset=reset)[0], (x, bad_a, state), dh)
    for gradient, other in zip(found[:2], expected[:2]):
        assert torch.equal(gradient[:, :3], other[:, :3])
    assert torch.equal(found[2], expected[2]) and not found[2][0].any()


@pytest.mark.parametrize("time", [0, 1, 7])
def test_gated_scan_compiles_whatever_the_strides(time):
    a = torch.rand(3, time, 2).permute(2, 1, 0)
    state = torch.randn(3, 2).t()

    def strides(device):
        inputs = [x.to(device) for x in (torch.randn(2, time, 3), a, state)]
        forward = ops.gated_scan(*inputs)
        backward = ops.gated_scan_backward(inputs[0], inputs[2], inputs[1], inputs[0], inputs[2], reset=None)
        return [x.stride() for x in (*forward, *backward)]

    assert strides("cpu") == strides("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cu_seqlens_are_integers_of_either_size(dtype):
    """flash-attn's are int32, flash-linear-attention's int64."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    calls = {
        ops.mlstm_chunkwise: (make(1, 9, 2, 4), make(1, 9, 2, 4), make(1, 9, 2, 4), make(1, 9, 2), make(1, 9, 2)),
        ops.slstm: (make(1, 9, 4, 2, 4), make(4, 2, 4, 4), make(4, 2, 4)),
        ops.causal_conv1d: (make(1, 9, 4), make(4, 3)),
    }
    for call, inputs in calls.items():
        results = []
        for integers in (torch.int32, torch.int64):
            out = call(*inputs, cu_seqlens=torch.tensor([0, 2, 2, 9], dtype=integers))
            results.append([out[0], *torch.autograd.grad(out[0].square().sum(), inputs), *(x.detach() for x in out[1:])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), call


def test_gated_linear_attention_in_chunks_has_its_backward_operator():
    q, k, v = (torch.randn(1, 5, 1, 2, dtype=torch.double, requires_grad=True) for _ in range(3))
    g = -torch.rand_like(q)

    def run(q, k, v, g):
        return ops.gated_linear_attention(q, k, v, g, chunk_size=4)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, g.detach().requires_grad_()))
    with pytest.raises(RuntimeError, match="derivative"):
        gradient, = torch.autograd.grad(run(q, k, v, g).square().sum(), k, create_graph=True)
        gradient.sum().backward()
    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    expected = torch.autograd.grad(run(q, k, v, g).square().sum(), (q, k, v))
    found = torch.autograd.grad(compiled(q, k, v, g).square().sum(), (q, k, v))
    for gradient, other in zip(found, expected):
        torch.testing.assert_close(gradient, other)


def test_backward_operators_take_absent_gradients():
    k, w = torch.randn(2, 7, 5), -torch.rand(5)
    y = ops.wkv(k, k, w, w)[0]
    zeros = torch.zeros(2, 5)
    absent = ops.wkv_backward(torch.ones_like(y), None, None, k, k, w, w, None, None, None, reset=None)
    given = ops.wkv_backward(torch.ones_like(y), zeros, zeros, k, k, w, w, None, None, None, reset=None)
    assert all(torch.equal(a, b) for a, b in zip(absent, given, strict=True))


def test_states_that_are_written_in_place():
    state = torch.zeros(1, 3, 1).expand(2, -1, -1)
    with pytest.raises(RuntimeError, match="memory"):
        ops.causal_conv1d_step(torch.ones(2, 1), torch.ones(1, 4), None, state)
    step = DIFFERENTIABLE["mlstm_step"]()
    c, n, m = step[5:]
    with pytest.raises(RuntimeError, match="memory"):
        ops.mlstm_step(step[0], n, *step[2:5], c, n, m)  # k is read after n was written
    for i in range(3):  # the state is as it was
        states = [x[:1].expand_as(x) if i == j else x.clone() for j, x in enumerate((c, n, m))]
        before = [x.clone() for x in states]
        with pytest.raises(RuntimeError, match="memory"):
            ops.mlstm_step(*step[:5], *states)
        assert all(torch.equal(x, y) for x, y in zip(states, before))

    def within(whole, part):
        return whole.flatten()[: part.numel()].view_as(part)

    for states in ((c, within(c, n), m), (c, n, within(c, m)), (c, n, within(n, m))):  # written to twice
        with pytest.raises(RuntimeError, match="memory"):
            ops.mlstm_step(*step[:5], *states)
    with torch.inference_mode():
        made = [torch.zeros_like(x) for x in (c, n, m)]
        ops.mlstm_step(*step[:5], *made)
    with pytest.raises(RuntimeError, match="inference mode"), torch.no_grad():
        ops.mlstm_step(*step[:5], *made)


def in_place_calls():
    """Operator -> what it reads and what it writes, the number of what it writes first."""
    k = torch.randn(1, 1, 2)
    step = [torch.randn(1, 1, 2) for _ in range(3)] + [torch.randn(1, 1) for _ in range(2)]
    state = lambda: [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1)]  # noqa: E731
    ring = lambda: [torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2),  # noqa: E731
                    torch.zeros(1, 1, dtype=torch.int32)]
    maps = [torch.randn(1, 2, 2), None] * 3 + [torch.randn(1, 6), torch.randn(1)] * 2
    return {
        "mlstm_step": (step, state()),
        "mlstm_step_inputs": ([k[0], torch.randn(2, 4), None, *maps], [torch.zeros(1, 3, 2)]),
        "mlstm_step_lazy": (step, state() + ring()),
        "mlstm_fold": ([], state() + ring()),
        "causal_conv1d_step": ([k[0], torch.randn(2, 4), None], [torch.zeros(1, 3, 2)]),
    }


@pytest.mark.parametrize("operator", in_place_calls())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_sees_what_was_written(operator, mode):
    read, written = in_place_calls()[operator]
    scale = torch.ones((), requires_grad=True)
    y = (scale * written[0]).sum()
    with mode():
        getattr(ops, operator)(*read, *written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("operator", in_place_calls())
def test_what_inference_mode_made_is_not_written_outside_it(operator):
    with torch.inference_mode():
        read, written = in_place_calls()[operator]
        before = [x.clone() for x in written]
    with pytest.raises(RuntimeError, match=f"{operator}: .*made in inference mode"):
        getattr(ops, operator)(*read, *written)
    assert all(torch.equal(x, y) for x, y in zip(written, before))


def test_what_is_written_lies_apart():
    state = torch.zeros(1, 3, 2)
    with pytest.raises(RuntimeError, match="memory"):
        ops.causal_conv1d_step(state[:, 2], torch.randn(2, 4), None, state)
    read, _ = in_place_calls()["mlstm_step_inputs"]
    with pytest.raises(RuntimeError, match="memory"):
        ops.mlstm_step_inputs(state[:, 2], *read[1:], state)
    read, (c, n, m, keys, values, gates, count) = in_place_calls()["mlstm_step_lazy"]
    short = [x[:, :, :2].contiguous() for x in (values, gates)]
    for ring in ((keys, keys, gates), (keys, values, keys), (c, *short)):
        with pytest.raises(RuntimeError, match="memory"):
            ops.mlstm_step_lazy(*read, c, n, m, *ring, count)
    with pytest.raises(RuntimeError, match="memory"):
        ops.mlstm_fold(c, n, m, c, *short, count)


def test_tensors_without_dimensions_are_an_error_on_meta_too():
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="block_linear: x: expected"):
            ops.block_linear(torch.zeros((), device=device), torch.zeros(2, 3, 3, device=device))


@pytest.mark.parametrize("operator, option, values", [
    ("mlstm_chunkwise", "eps", (-1.0, NAN)), ("mlstm_chunkwise", "scale", (NAN, float("inf"))),
    ("mlstm_step", "eps", (-1.0, NAN)), ("headwise_norm", "eps", (-10.0, NAN)), ("residual_norm", "eps", (-1.0,)),
    ("linear_cross_entropy", "soft_cap", (-1.0, float("inf"), NAN)),
])
def test_numbers_that_make_no_sense(operator, option, values):
    for value in values:
        with pytest.raises(RuntimeError, match=rf"{operator}: {option}: expected"):
            getattr(ops, operator)(*DIFFERENTIABLE[operator](), **{option: value})


FORWARD = [name for name in OPERATORS if not name.endswith(("_backward", "_forward"))]


@pytest.mark.parametrize("operator", FORWARD)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_types_that_make_no_sense(operator, dtype):
    """Converted, a complex number would lose half of itself, and a result in the type of an integer its fraction."""
    tensors, options = real_call(operator)
    for name, x in tensors.items():
        if x is None or not x.is_floating_point():
            continue
        with pytest.raises(RuntimeError, match=rf"^{operator}: (\w+: expected (float32|dtype)|{name}: expected)"):
            getattr(ops, operator)(**tensors | {name: x.to(dtype)}, **options)


def test_sizes_are_named_where_gradients_are_recorded():
    row = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="gated_linear_attention: q: expected 4 dimensions, got 1"):
        ops.gated_linear_attention(row, row, row, row)
    with pytest.raises(RuntimeError, match="linear_int8: x: expected at least 1 dimension, got none"):
        ops.linear_int8(row[0], ops.quantize_int8(torch.zeros(2, 3)))
