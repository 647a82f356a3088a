"""The operators of the linear-attention family against plain float64 loops: values, states, every gradient."""

import pytest
import torch

import libxlstm  # noqa: F401  (loads the operators)

NAMES = ("q", "k", "v", "g", "u", "state0")
SIZES = [(1, 1, 1, 1, 1), (2, 7, 3, 5, 3), (1, 33, 2, 17, 20), (3, 70, 1, 8, 33), (2, 16, 2, 4, 64)]


def gated_loop(q, k, v, g, u=None, state0=None, reset=None, scale=None):
    """Straight from the definition."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if state0 is None else state0
    out = []
    for t in range(q.shape[1]):
        if reset is not None:
            s = torch.where(reset[:, t, None, None, None], torch.zeros_like(s), s)
        new = k[:, t, :, :, None] * v[:, t, :, None, :]
        after = g[:, t].exp()[..., None] * s + new
        read = after if u is None else s + u[..., None] * new
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], read) * scale)
        s = after
    return torch.stack(out, 1), s


def arguments(sizes, decay, bonus, state, dtype=torch.float64):
    batch, time, heads, dk, dv = sizes
    torch.manual_seed(sum(sizes))
    make = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    g = torch.nn.functional.logsigmoid(make(batch, time, heads, dk))
    if decay == "strong":  # from 1 to e^-200 within a few tokens
        g = g * torch.where(torch.rand(g.shape) < 0.3, 200.0, 0.01)
    if decay == "none":
        g = torch.zeros_like(g)
    made = [make(batch, time, heads, dk), make(batch, time, heads, dk), make(batch, time, heads, dv), g,
            make(heads, dk) if bonus else None, make(batch, heads, dk, dv) if state else None]
    return [t if t is None else t.to(dtype) for t in made]


def leaves(tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def resets(batch, time):
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[0, time // 2] = True
    reset[-1, 0] = True
    reset[-1, -1] = True
    return reset


def close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("decay", ["mild", "strong", "none"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("state, with_reset", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("chunk_size", [0, 5, 16])
def test_gated_linear_attention_is_its_definition(sizes, decay, bonus, state, with_reset, chunk_size):
    inputs = arguments(sizes, decay, bonus, state)
    reset = resets(*sizes[:2]) if with_reset else None
    ours, loop = leaves(inputs), leaves(inputs)
    out = torch.ops.xlstm.gated_linear_attention(*ours, reset=reset, chunk_size=chunk_size)
    wanted = gated_loop(*loop, reset=reset)
    gradients = [torch.randn_like(t) for t in wanted]
    torch.autograd.backward(out, gradients)
    torch.autograd.backward(wanted, gradients)
    for mine, other in zip(out, wanted):
        close(mine, other)
    for name, mine, other in zip(NAMES, ours, loop):
        if mine is not None:
            assert torch.isfinite(mine.grad).all(), name
            close(mine.grad, other.grad)


def test_chunks_longer_than_the_sequence():
    """Padded to 2^40 tokens they would need all memory there is."""
    results = []
    for chunk_size in (5, 2**40):
        given = leaves(arguments((2, 5, 2, 3, 4), "mild", True, True))
        h, state = torch.ops.xlstm.gated_linear_attention(*given, chunk_size=chunk_size)
        results.append([h, state, *torch.autograd.grad(h.sum() + state.sum(), given)])
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 16])
def test_steps_and_halves_are_the_sequence(bonus, chunk_size):
    q, k, v, g, u, _ = arguments((2, 40, 2, 8, 12), "mild", bonus, False)
    run = lambda a, b, s: torch.ops.xlstm.gated_linear_attention(  # noqa: E731
        q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b], u, s, scale=0.7, chunk_size=chunk_size)
    whole, last = run(0, 40, None)
    first, middle = run(0, 23, None)
    second, end = run(23, 40, middle)
    close(torch.cat([first, second], 1), whole)
    close(end, last)
    state, rows = None, []
    for t in range(40):
        h, state = run(t, t + 1, state)
        rows.append(h)
    close(torch.cat(rows, 1), whole)
    close(state, last)
    h, same = run(40, 40, state)
    assert h.shape == (2, 0, 2, 12) and torch.equal(same, state)


@pytest.mark.parametrize("decay", ["mild", "strong", "none"])
@pytest.mark.parametrize("bonus", [False, True])
def test_low_precision_is_as_exact_as_its_inputs(decay, bonus):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        low = arguments((2, 100, 2, 32, 48), decay, bonus, True, dtype)
        low[5] = low[5].float()
        exact_leaves = leaves([t if t is None else t.double() for t in low])
        exact = gated_loop(*exact_leaves)
        gradient = torch.randn(exact[0].shape).to(dtype)
        exact[0].backward(gradient.double())
        for chunk_size in (0, 16):
            mine = leaves(low)
            h, state = torch.ops.xlstm.gated_linear_attention(*mine, chunk_size=chunk_size)
            assert h.dtype == dtype and state.dtype == torch.float32
            h.backward(gradient)
            for got, wanted in [(h, exact[0]), (state, exact[1])] + [
                    (a.grad, b.grad) for a, b in zip(mine, exact_leaves) if a is not None]:
                assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 16])
def test_no_bit_of_a_document_reaches_the_next(bonus, chunk_size):
    border = 7
    inputs = arguments((2, 40, 2, 8, 12), "mild", bonus, True, torch.float32)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, border] = True
    results = []
    for change in (0, 3):
        changed = [t if t is None else t.clone() for t in inputs]
        for t in changed[:3]:
            t[:, :border] += change
        changed[3][:, :border] -= change
        changed[5] += change
        changed = leaves(changed)
        h, state = torch.ops.xlstm.gated_linear_attention(*changed, reset=reset, chunk_size=chunk_size)
        (h[:, border:].square().sum() + state.sum()).backward()
        results.append([h[:, border:], state] + [t.grad[:, border:] for t in changed[:4]])
        assert all((t.grad[:, :border] == 0).all() for t in changed[:4]) and (changed[5].grad == 0).all()
    for before, after in zip(*results):
        assert torch.equal(before, after)


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_without_tokens_the_state_and_its_gradient_are_copies(chunk_size):
    inputs = leaves(arguments((2, 0, 2, 3, 4), "mild", True, True))
    _, state = torch.ops.xlstm.gated_linear_attention(*inputs, chunk_size=chunk_size)
    upstream = torch.randn_like(state)
    gradients = torch.autograd.grad(state, inputs, upstream)
    assert torch.equal(state, inputs[5]) and torch.equal(gradients[5], upstream)
    assert state.data_ptr() != inputs[5].data_ptr() and gradients[5].data_ptr() != upstream.data_ptr()
    assert all((x == 0).all() for x in gradients[:5])


@pytest.mark.parametrize("chunk_size", [0, 16])
@pytest.mark.parametrize("sizes", [(0, 5, 2, 3, 4), (2, 5, 0, 3, 4), (2, 5, 2, 0, 4), (2, 5, 2, 3, 0)])
def test_zero_sizes(sizes, chunk_size):
    inputs = leaves(arguments(sizes, "none", True, True))
    h, state = torch.ops.xlstm.gated_linear_attention(*inputs, chunk_size=chunk_size)
    assert torch.equal(h, torch.zeros_like(inputs[2])) and torch.equal(state, inputs[5])
    gradients = torch.autograd.grad([h, state], inputs, [torch.ones_like(h), torch.ones_like(state)])
    assert all((x == 0).all() for x in gradients[:5]) and torch.equal(gradients[5], torch.ones_like(state))


@pytest.mark.parametrize("chunk_size", [0, 16])
@pytest.mark.parametrize("sizes", [(2, 32, 1, 1, 1), (2, 20, 3, 5, 7)])
def test_results_lie_in_memory_as_the_meta_kernel_says(sizes, chunk_size):
    """Also where the arguments are contiguous and channels-last at once."""
    inputs = arguments(sizes, "mild", True, True)
    if sizes[2:] == (1, 1, 1):
        inputs[:4] = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in inputs[:4]]
        assert all(x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last) for x in inputs[:4])
    results = []
    for device in ("cpu", "meta"):
        given = leaves([x.to(device) for x in inputs])
        out = torch.ops.xlstm.gated_linear_attention(*given, chunk_size=chunk_size)
        results.append([*out, *torch.autograd.grad(out, given, [torch.ones_like(x) for x in out])])
    for name, ours, promised in zip(("h", "state", *NAMES), *results):
        assert ours.shape == promised.shape and ours.is_contiguous() and promised.is_contiguous(), name


@pytest.mark.parametrize("name, rank", [("dh", 3), ("dstate", 2)])
def test_the_backward_operator_refuses_gradients_of_another_shape(name, rank):
    given = arguments((2, 5, 2, 3, 4), "mild", True, True)
    upstream = {"dh": torch.ones(2, 5, 2, 4).double(), "dstate": torch.ones(2, 2, 3, 4).double()}
    upstream[name] = upstream[name].narrow(rank, 0, 1)
    with pytest.raises(RuntimeError, match=f"gated_linear_attention: {name}: expected"):
        torch.ops.xlstm.gated_linear_attention_backward(*upstream.values(), *given, reset=None, scale=None)


def test_a_gate_of_minus_infinity_empties_the_row():
    q, k, v, g, u, state = arguments((2, 20, 2, 4, 6), "mild", False, True)
    shut = g.clone()
    shut[:, 9] = -float("inf")
    for chunk_size in (0, 16):
        h, last = torch.ops.xlstm.gated_linear_attention(q, k, v, shut, u, state, chunk_size=chunk_size)
        fresh, fresh_last = torch.ops.xlstm.gated_linear_attention(q[:, 9:], k[:, 9:], v[:, 9:], g[:, 9:])
        close(h[:, 9:], fresh)
        close(last, fresh_last)


@pytest.mark.parametrize("gamma", [0.9, 1 - 2 ** -5, 1 - 2 ** -12])
def test_mlstm_cell_with_fixed_gates_is_a_scalar_decay(gamma):
    """What linear attention and RetNet run on: sigmoid gates wide open and at logit(gamma), without normaliser."""
    q, k, v, _, _, state = arguments((2, 2000, 2, 16, 24), "none", False, True, torch.float32)
    logit = torch.tensor(gamma / (1 - gamma), dtype=torch.float64).log().float()
    gates = torch.full((2, 2000, 2), 100.0), torch.full((2, 2000, 2), logit.item())
    zeros = state.new_zeros(2, 2, 16), state.new_zeros(2, 2)
    h, c, _, _ = torch.ops.xlstm.mlstm_chunkwise(q, k, v, *gates, state, *zeros, input_gate="sigmoid", normalize=False)
    g = torch.full_like(q, 1, dtype=torch.float64) * torch.tensor(gamma, dtype=torch.float64).log()
    wanted, last = gated_loop(q.double(), k.double(), v.double(), g, None, state.double())
    assert (h.double() - wanted).norm() <= 2e-6 * wanted.norm()
    assert (c.double() - last).norm() <= 2e-6 * last.norm()


def scan_loop(x, a, state0=None, reset=None):
    h = x.new_zeros(x.shape[0], x.shape[2]) if state0 is None else state0
    out = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = a[:, t] * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1), h


@pytest.mark.parametrize("batch, time, dim", [(1, 1, 1), (2, 7, 5), (3, 33, 17), (2, 100, 130)])
@pytest.mark.parametrize("state, with_reset", [(False, False), (True, False), (True, True)])
def test_gated_scan_is_its_definition(batch, time, dim, state, with_reset):
    torch.manual_seed(batch + time + dim)
    make = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    inputs = [make(batch, time, dim), torch.sigmoid(3 * make(batch, time, dim)), make(batch, dim) if state else None]
    reset = resets(batch, time) if with_reset else None
    ours, loop = leaves(inputs), leaves(inputs)
    out, wanted = torch.ops.xlstm.gated_scan(*ours, reset=reset), scan_loop(*loop, reset=reset)
    gradients = [torch.randn_like(t) for t in wanted]
    torch.autograd.backward(out, gradients)
    torch.autograd.backward(wanted, gradients)
    for mine, other in zip(out, wanted):
        close(mine, other)
    for mine, other in zip(ours, loop):
        if mine is not None:
            close(mine.grad, other.grad)


@pytest.mark.parametrize("name", ["gated_linear_attention", "gated_scan"])
def test_gated_operators_keep_torchs_contract(name):
    operator = getattr(torch.ops.xlstm, name)
    inputs = arguments((2, 5, 2, 3, 4), "mild", True, True)
    if name == "gated_scan":
        inputs = [torch.randn(2, 5, 6), torch.rand(2, 5, 6), torch.randn(2, 6)]
    torch.library.opcheck(operator.default, leaves(inputs), {"reset": resets(2, 5)})
    with pytest.raises(RuntimeError, match=name):
        operator(*[inputs[0][0], *inputs[1:]])
    repeated = [operator(*inputs)[0] for _ in range(2)]
    assert torch.equal(*repeated)
