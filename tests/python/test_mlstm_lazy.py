"""torch.ops.xlstm.mlstm_step_lazy and mlstm_fold against mlstm_step and the chunkwise form; opcheck; errors."""

import pytest
import torch
from test_mlstm import leaves, make, make_states

import libxlstm  # noqa: F401  registers the operators

chunkwise = torch.ops.xlstm.mlstm_chunkwise
step = torch.ops.xlstm.mlstm_step
lazy = torch.ops.xlstm.mlstm_step_lazy
fold = torch.ops.xlstm.mlstm_fold
GATES = [("exp", True), ("exp", False), ("sigmoid", True), ("sigmoid", False)]


def make_ring(k, v, tokens, fill=0.0):
    """Of q, k, v with a time axis; its slots hold `fill`, which must never be seen."""
    batch, _, heads, dqk = k.shape
    wide = torch.promote_types(k.dtype, torch.float32)
    return [
        k.new_full((batch, heads, tokens, dqk), fill),
        k.new_full((batch, heads, tokens, v.shape[-1]), fill),
        k.new_full((batch, heads, tokens, 2), fill, dtype=wide),
        k.new_zeros(batch, heads, dtype=torch.int32),
    ]


def decode(inputs, state, ring=None, **options):
    """h of all tokens, one after another."""
    run, rest = (step, state) if ring is None else (lazy, [*state, *ring])
    return torch.stack([run(*(x[:, t] for x in inputs), *rest, **options) for t in range(inputs[0].shape[1])], 1)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 64])
@pytest.mark.parametrize(("batch", "dqk", "dv"), [(1, 8, 8), (3, 5, 7), (2, 1, 33)])
def test_forty_tokens_equal_the_plain_step_and_the_chunkwise_form(gate, tokens, batch, dqk, dv):
    sizes = {"batch": batch, "time": 40, "heads": 2, "dqk": dqk, "dv": dv}
    options = {"input_gate": gate[0], "normalize": gate[1]}
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        inputs = make(**sizes, gate_size=2.0, dtype=dtype)
        start = [x.to(dtype) for x in make_states(batch, 2, dqk, dv)]
        state, plain = [x.clone() for x in start], [x.clone() for x in start]
        ring = make_ring(inputs[1], inputs[2], tokens, fill=float("nan"))
        h = decode(inputs, state, ring, **options)
        assert torch.equal(ring[3], torch.full_like(ring[3], 40 % tokens))
        fold(*state, *ring, input_gate=gate[0])
        assert torch.equal(ring[3], torch.zeros_like(ring[3]))
        expected = chunkwise(*(x.double() for x in (*inputs, *start)), **options)
        for name, a, b in zip("hcnm", (h, *state), expected):
            assert (a - b).norm() <= limit * (1 + b.norm()), name
        for name, a, b in zip("hcnm", (h, *state), (decode(inputs, plain, **options), *plain)):
            assert (a - b).norm() <= 2 * limit * (1 + b.norm()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_states(dtype):
    inputs = make(time=40, dqk=6, dv=5, dtype=dtype)
    state = [torch.zeros(2, 2, 6, 5), torch.zeros(2, 2, 6), torch.zeros(2, 2)]
    plain = [x.clone() for x in state]
    ring = make_ring(inputs[1], inputs[2], 16)
    h, expected = decode(inputs, state, ring), decode(inputs, plain)
    assert h.dtype == dtype
    torch.testing.assert_close(h, expected)  # rounded once, of numbers that differ by float32 rounding
    fold(*state, *ring)
    for a, b in zip(state, plain):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_every_head_folds_by_itself():
    """Counts may differ from head to head: as after states of several sequences are put together."""
    inputs = make(time=11, dtype=torch.float32)
    state = [torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3), torch.zeros(2, 2)]
    ring = make_ring(inputs[1], inputs[2], 4)
    first = [x[:1] for x in (*state, *ring)]  # views: the first sequence is two tokens ahead
    ahead = decode([x[:1, :2] for x in inputs], first[:3], first[3:])
    h = decode([torch.cat([x[:1, 2:], x[1:, :9]]) for x in inputs], state, ring)
    assert ring[3].tolist() == [[3, 3], [1, 1]]
    fold(*state, *ring)
    one, other = chunkwise(*(x[:1] for x in inputs)), chunkwise(*(x[1:, :9] for x in inputs))
    torch.testing.assert_close(torch.cat([ahead, h[:1]], 1), one[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h[1:], other[0], rtol=1e-4, atol=1e-5)
    for a, b, c in zip(state, one[1:], other[1:]):
        torch.testing.assert_close(a, torch.cat([b, c]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"heads": 0}, {"dv": 0}])
def test_zero_sizes(empty):
    inputs = make(**({"time": 5, "dtype": torch.float32} | empty))
    start = [x.float() for x in make_states(inputs[0].shape[0], inputs[0].shape[2], 3, inputs[2].shape[3])]
    state, plain = [x.clone() for x in start], [x.clone() for x in start]
    ring = make_ring(inputs[1], inputs[2], 2)
    torch.testing.assert_close(decode(inputs, state, ring), decode(inputs, plain))
    fold(*state, *ring)
    for a, b in zip(state, plain):
        torch.testing.assert_close(a, b)


def test_folding_an_empty_ring_changes_no_bit():
    inputs = make(dtype=torch.float32)
    state = [x.float() for x in make_states()]
    state[2][0, 0] = -float("inf")  # an empty state
    before = [x.clone() for x in state]
    fold(*state, *make_ring(inputs[1], inputs[2], 16, fill=float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_folding_marks_what_it_writes():
    inputs = make(dtype=torch.float32)
    state, ring = [x.float() for x in make_states()], make_ring(inputs[1], inputs[2], 16)
    lazy(*(x[:, 0] for x in inputs), *state, *ring)
    written = (*state, ring[-1])
    versions = [x._version for x in written]
    fold(*state, *ring)
    assert all(x._version > before for x, before in zip(written, versions))


def test_a_nan_gate_spoils_its_head_alone():
    inputs = make(time=3, dtype=torch.float32)
    inputs[4][0, 1, 1] = float("nan")
    state = [torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3), torch.zeros(2, 2)]
    ring = make_ring(inputs[1], inputs[2], 8)
    h = decode(inputs, state, ring)
    fold(*state, *ring)
    for x in (h[:, 2], *state):
        bad = x.isnan().reshape(2, 2, -1).any(-1)
        assert bad.tolist() == [[False, True], [False, False]]


def test_inner_strides_of_states_and_ring():
    inputs = make(time=7, dtype=torch.float32, layout="spread")
    state = [torch.stack([torch.zeros(s)] * 2, -1)[..., 0] for s in ((2, 2, 3, 4), (2, 2, 3), (2, 2))]
    ring = [torch.stack([x] * 2, -1)[..., 0] for x in make_ring(inputs[1], inputs[2], 3)]
    h = decode(inputs, state, ring)
    fold(*state, *ring)
    for a, b in zip((h, *state), chunkwise(*inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs = make(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    state = [x.to(wide) for x in make_states()]
    ring = make_ring(inputs[1], inputs[2], 2)
    token = [x[:, 0] for x in inputs]
    torch.library.opcheck(lazy.default, (*token, *state, *ring))
    ring[3].fill_(1)
    torch.library.opcheck(lazy.default, (*token, *state, *ring), {"input_gate": "sigmoid", "normalize": False})
    torch.library.opcheck(fold.default, (*state, *ring))


def test_meta():
    inputs = [x[:, 0].to("meta") for x in make(dtype=torch.bfloat16)]
    state = [x.float().to("meta") for x in make_states()]
    ring = [x.to("meta") for x in make_ring(*make(dtype=torch.bfloat16)[1:3], 16)]
    h = lazy(*inputs, *state, *ring)
    assert h.shape == (2, 2, 4) and h.dtype == torch.bfloat16 and h.is_meta
    assert fold(*state, *ring) is None


def test_autocast():
    inputs = [x[:, 0] for x in make(dtype=torch.float32)]
    state, other = [x.float() for x in make_states()], [x.float() for x in make_states()]
    ring, same = (make_ring(*make(dtype=torch.bfloat16)[1:3], 2) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = lazy(*inputs, *state, *ring)
    assert torch.equal(h, lazy(*(x.bfloat16() for x in inputs[:3]), *inputs[3:], *other, *same))


def test_no_derivative():
    inputs = leaves([x[:, 0] for x in make(dtype=torch.float32)])
    state = [torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3), torch.zeros(2, 2)]
    ring = make_ring(*make(dtype=torch.float32)[1:3], 2)
    versions = [x._version for x in (*state, *ring)]
    h = lazy(*inputs, *state, *ring)
    assert all(x._version > before for x, before in zip((*state, *ring), versions))
    with pytest.raises(RuntimeError, match="mlstm_step_lazy has no derivative"):
        h.sum().backward()
    with pytest.raises(RuntimeError, match="mlstm_step_lazy: c, n, m: expected states without gradient"):
        lazy(*inputs, *leaves(state), *ring)
    with pytest.raises(RuntimeError, match="mlstm_fold: c, n, m: expected states without gradient"):
        fold(*leaves(state), *ring)


def test_errors_name_the_argument():
    q, k, v, i, f = (x[:, 0] for x in make(dtype=torch.float32))
    state = [torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3), torch.zeros(2, 2)]
    good = make_ring(*make(dtype=torch.float32)[1:3], 4)

    def fails(match, *, place, tensor):
        ring = list(good)
        ring[place] = tensor
        for name, call in (("mlstm_step_lazy", lambda: lazy(q, k, v, i, f, *state, *ring)),
                           ("mlstm_fold", lambda: fold(*state, *ring))):
            with pytest.raises(RuntimeError, match=f"{name}: {match}"):
                call()

    fails(r"keys: expected \(B,NH,R,DQK\) with R >= 1", place=0, tensor=good[0][:, :, :0])
    fails(r"keys: expected \(B,NH,R,DQK\) = \[2, 2, 4, 3\], got", place=0, tensor=good[0][..., :2])
    fails("keys: expected 4 dimensions, got 3", place=0, tensor=good[0][0])
    fails(r"values: expected \(B,NH,R,DV\) = \[2, 2, 4, 4\], got", place=1, tensor=good[1][:, :, :3])
    fails("values: expected dtype Float, got Double", place=1, tensor=good[1].double())
    fails(r"gates: expected \(B,NH,R,2\) = \[2, 2, 4, 2\], got", place=2, tensor=good[2][..., 0])
    fails("gates: expected dtype Float, got BFloat16", place=2, tensor=good[2].bfloat16())
    fails(r"count: expected \(B,NH\) = \[2, 2\], got", place=3, tensor=good[3][0])
    fails("count: expected dtype Int, got Long", place=3, tensor=good[3].long())
    fails("count: expected 0 to R - 1 = 3, got 4 to 4", place=3, tensor=torch.full_like(good[3], 4))
    fails("count: expected 0 to R - 1 = 3, got -1 to -1", place=3, tensor=torch.full_like(good[3], -1))
    with pytest.raises(RuntimeError, match="mlstm_step_lazy: keys: expected dtype BFloat16, got Float"):
        lazy(q.bfloat16(), k.bfloat16(), v.bfloat16(), i, f, *state, *good)
    with pytest.raises(RuntimeError, match="mlstm_fold: c: expected 4 dimensions, got 2"):
        fold(state[2], *state[1:], *good)
    with pytest.raises(RuntimeError, match="mlstm_fold: input_gate: expected"):
        fold(*state, *good, input_gate="tanh")
    with pytest.raises(RuntimeError, match="mlstm_step_lazy: v: expected"):
        lazy(q, k, v[:, :1], i, f, *state, *good)
