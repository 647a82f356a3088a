"""torch.ops.xlstm.mlstm_*: gradcheck, opcheck, packages that compute the same, low precision, packed documents, errors."""

import math

import pytest
import torch
from torch.nn import functional as F

import libxlstm  # noqa: F401  registers the operators

chunkwise = torch.ops.xlstm.mlstm_chunkwise
forward = torch.ops.xlstm.mlstm_chunkwise_forward
backward = torch.ops.xlstm.mlstm_chunkwise_backward
step = torch.ops.xlstm.mlstm_step
KEYWORDS = {"reset": None, "cu_seqlens": None, "input_gate": "exp", "normalize": True, "scale": None, "eps": 1e-6}
KEYWORDS["chunk_size"] = 0
NAMES = ("q", "k", "v", "igate", "fgate")


def make(batch=2, time=7, heads=2, dqk=3, dv=4, *, gate_size=1.0, seed=0, dtype=torch.float64, layout="plain"):
    """q, k, v, igate, fgate. layout "plain" | "heads" (B,NH,T,D in memory) | "spread" (inner stride 2)."""
    g = torch.Generator().manual_seed(seed)

    def random(*sizes, width=None):
        width = () if width is None else (width,)
        if layout == "heads":
            return torch.randn(sizes[0], sizes[2], sizes[1], *width, generator=g, dtype=torch.float64).transpose(1, 2)
        if layout == "spread":
            return torch.randn(*sizes, *width, 2, generator=g, dtype=torch.float64)[..., 0]
        return torch.randn(*sizes, *width, generator=g, dtype=torch.float64)

    shape = (batch, time, heads)
    q, k, v = random(*shape, width=dqk), random(*shape, width=dqk), random(*shape, width=dv)
    i, f = random(*shape) * gate_size, random(*shape) * gate_size + 1
    return [x if dtype == torch.float64 else x.to(dtype) for x in (q, k, v, i, f)]


def make_states(count=2, heads=2, dqk=3, dv=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    random = lambda *sizes: torch.randn(*sizes, generator=g, dtype=torch.float64)  # noqa: E731
    return [random(count, heads, dqk, dv), random(count, heads, dqk), random(count, heads)]


def leaves(tensors):
    """The same layout, but as leaves of a graph."""
    return [x.detach().requires_grad_() for x in tensors]


def plain_aten(q, k, v, i, f, *, eps=1e-6, siging=False, normalize=True):
    """The parallel form in ATen operations of q's dtype, gates in float32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    i, f = (x.transpose(1, 2).to(wide) for x in (i, f))
    log_i = F.logsigmoid(i) if siging else i
    total = F.logsigmoid(f).cumsum(-1)
    exponent = total[..., :, None] - total[..., None, :] + log_i[..., None, :]
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    exponent = exponent.masked_fill(~mask, -math.inf)
    m = torch.zeros_like(total) if siging else torch.maximum(exponent.amax(-1), total).detach()
    weights = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 * torch.exp(exponent - m[..., None]).to(q.dtype)
    if not normalize:
        return (weights @ v).transpose(1, 2)
    norm = torch.maximum(weights.sum(-1).abs(), torch.exp(-m).to(q.dtype)) + eps
    return ((weights @ v) / norm[..., None]).transpose(1, 2)


# ---- gradients ---------------------------------------------------------------------------------------------------


def invariant(q, k, v, i, f, c0=None, n0=None, m0=None, **options):
    """h and the true state e^m (C, n), which do not depend on the stabiliser at eps = 0."""
    h, c, n, m = chunkwise(q, k, v, i, f, c0, n0, m0, eps=0.0, **options)
    return h, c * torch.exp(m)[..., None, None], n * torch.exp(m)[..., None]


def check_gradients(inputs, states, **options):
    m0 = states[2] if states else None
    tensors = leaves(inputs + states[:2])
    assert torch.autograd.gradcheck(lambda *x: invariant(*x, *([m0] if states else []), **options), tensors)


@pytest.mark.parametrize("gate", [("exp", True), ("sigmoid", True), ("sigmoid", False)])
@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("with_states", [False, True])
def test_gradcheck(gate, chunk, with_states):
    options = {"input_gate": gate[0], "normalize": gate[1], "chunk_size": chunk}
    check_gradients(make(), make_states() if with_states else [], **options)


@pytest.mark.parametrize("time", [0, 1, 5])
def test_gradcheck_with_resets(time):
    reset = torch.tensor([[False, False, True, False, True], [True, False, False, False, False]])[:, :time]
    for chunk in (0, 2):
        check_gradients(make(time=time), make_states(), reset=reset, chunk_size=chunk)


def test_gradcheck_packed():
    cu_seqlens = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    check_gradients(make(batch=1, time=9), make_states(count=4), cu_seqlens=cu_seqlens, chunk_size=2)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 6] = True
    check_gradients(make(batch=1, time=9), make_states(count=4), cu_seqlens=cu_seqlens, reset=reset)


@pytest.mark.parametrize("with_states", [False, True])
def test_gradcheck_without_values(with_states):
    """Where v has no columns, the last n alone has gradients."""
    q, k, _, *gates = make(dv=0)
    _, n0, m0 = make_states(dv=0)
    v, c0 = q.new_zeros(*q.shape[:3], 0), n0.new_zeros(*n0.shape, 0)

    def last_n(q, k, i, f, n0=None):
        states = [] if n0 is None else [c0, n0, m0]
        _, _, n, m = chunkwise(q, k, v, i, f, *states, chunk_size=3)
        return n * torch.exp(m)[..., None]

    assert torch.autograd.gradcheck(last_n, leaves([q, k, *gates] + ([n0] if with_states else [])))


@pytest.mark.parametrize("layout", ["heads", "spread"])
def test_gradcheck_other_strides(layout):
    check_gradients(make(layout=layout), make_states(), chunk_size=4)


def test_gradcheck_extreme_gates():
    for size in (20.0, 300.0):
        # An exact tie of |n q| and exp(-m) has no gradient; these draws have none.
        inputs = make(gate_size=size, time=5)
        tensors = leaves(inputs)
        assert torch.autograd.gradcheck(lambda *x: chunkwise(*x, eps=0.0, chunk_size=2)[0], tensors, atol=1e-4)


def test_gradcheck_segments():
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        sizes = {"batch": 1, "time": 300, "heads": 1, "dqk": 64, "dv": 60}  # a smaller call would run on one thread
        tensors = leaves(make(**sizes))
        assert torch.autograd.gradcheck(lambda *x: chunkwise(*x, eps=0.0)[0], tensors, fast_mode=True)
    finally:
        torch.set_num_threads(threads)


def test_m0_gets_zero_and_m_has_no_gradient():
    inputs, states = make(), leaves(make_states())
    h, c, _, m = chunkwise(*inputs, *states)
    assert c.requires_grad and not m.requires_grad
    (gradient,) = torch.autograd.grad(h.sum(), states[2])
    assert torch.equal(gradient, torch.zeros_like(states[2]))


def test_second_derivative_is_a_clear_error():
    inputs = leaves(make())
    h = chunkwise(*inputs)[0]
    gradients = torch.autograd.grad((h * h).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for .*mlstm_chunkwise_backward.* is not implemented"):
        gradients[0].sum().backward()


# ---- other implementations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [("exp", True), ("sigmoid", True), ("sigmoid", False)])
@pytest.mark.parametrize("chunk", [0, 16, 10**9])
def test_equals_parallel_form(gate, chunk):
    a, b = leaves(make(time=50, dqk=8)), leaves(make(time=50, dqk=8))
    ours = chunkwise(*a, input_gate=gate[0], normalize=gate[1], eps=0.0, chunk_size=chunk)[0]
    other = plain_aten(*b, eps=0.0, siging=gate[0] == "sigmoid", normalize=gate[1])
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(ours)
    for x, y in zip(torch.autograd.grad(ours, a, weight), torch.autograd.grad(other, b, weight)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_equals_mlstm_kernels():
    native = pytest.importorskip("mlstm_kernels.torch").get_mlstm_kernel("chunkwise--native_autograd")
    shape = {"batch": 2, "time": 64, "heads": 2, "dqk": 16, "dv": 8}
    a, b = leaves(make(**shape)), leaves(make(**shape))
    states = make_states(dqk=16, dv=8)
    ours = chunkwise(*a, *states, eps=0.0)
    q, k, v, i, f = (x.transpose(1, 2) for x in b)
    initial = {"c_initial": states[0], "n_initial": states[1], "m_initial": states[2][..., None]}
    h, (c, n, m) = native(
        q, k, v, i, f, **initial, return_last_states=True, eps=0.0, chunk_size=16, autocast_kernel_dtype=torch.float64
    )
    for x, y in zip(ours, (h.transpose(1, 2), c, n, m[..., 0])):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(ours[0])
    theirs = torch.autograd.grad(h, b, weight.transpose(1, 2))
    for x, y in zip(torch.autograd.grad(ours[0], a, weight), theirs):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "gate_size"),
    [(torch.float32, 1.0), (torch.float32, 10.0), (torch.bfloat16, 1.0), (torch.bfloat16, 10.0), (torch.float16, 1.0)],
)  # strong gates make gradients that float16 cannot hold
def test_low_precision_is_as_good_as_aten(dtype, gate_size):
    inputs = make(time=150, heads=4, dqk=32, dv=32, gate_size=gate_size, dtype=dtype)
    exact = leaves(x.double() for x in inputs)
    weight = torch.randn(2, 150, 4, 32, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(function, tensors):
        h = function(*tensors)
        return [h, *torch.autograd.grad(h, tensors, weight.to(h.dtype))]

    expected = run(plain_aten, exact)
    ours = run(lambda *x: chunkwise(*x)[0], leaves(inputs))
    aten = run(plain_aten, leaves(inputs))
    for name, x, y, reference in zip(("h", *NAMES), ours, aten, expected):
        assert x.dtype == dtype
        error = (x.double() - reference).norm() / reference.norm()
        allowed = 2 * (y.double() - reference).norm() / reference.norm()
        assert error <= allowed, f"{name}: {error:.2e} against {allowed:.2e}"


# ---- packed documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_are_isolated(dtype):
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 17] = True

    def run(change):
        inputs = make(batch=1, time=40, dtype=dtype)
        for x in inputs:
            x[:, change] = math.nan
        inputs = leaves(inputs)
        h = chunkwise(*inputs, reset=reset, chunk_size=8)[0]
        return [h, *torch.autograd.grad(h, inputs, torch.ones_like(h))]

    for first, second in zip(run(slice(0, 0)), run(slice(3, 9))):
        assert torch.equal(first[:, 17:], second[:, 17:])
    for first, second in zip(run(slice(0, 0)), run(slice(30, 31))):
        assert torch.equal(first[:, :17], second[:, :17])


# ---- PyTorch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs = leaves(make(dtype=dtype))
    states = [x.float() for x in make_states()]
    reset = torch.zeros(2, 7, dtype=torch.bool)
    torch.library.opcheck(chunkwise.default, tuple(inputs))
    torch.library.opcheck(chunkwise.default, (*inputs, *leaves(states[:2]), states[2]), {"reset": reset})
    packed = {"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32), "input_gate": "sigmoid", "chunk_size": 2}
    torch.library.opcheck(chunkwise.default, tuple(leaves(make(batch=1, dtype=dtype))), packed)
    plain = [x.detach() for x in inputs]
    for given in ([None] * 3, states):
        torch.library.opcheck(forward.default, (*inputs, *given), KEYWORDS)
        h, _, _, _, product = forward(*plain, *given, **KEYWORDS)
        arguments = (torch.ones_like(h), None, None, *plain, *given, h, product)
        torch.library.opcheck(backward.default, arguments, KEYWORDS)
    torch.library.opcheck(step.default, (*(x[:, 0] for x in plain), *states))


def test_forward_returns_the_product_of_the_normaliser():
    inputs, states = make(dtype=torch.float32), [x.float() for x in make_states()]
    expected = chunkwise(*inputs, *states)
    *outputs, product = forward(*leaves(inputs), *states, **KEYWORDS)
    for x, y in zip(outputs, expected):
        assert torch.equal(x, y)
    assert product.shape == (2, 7, 2) and product.dtype == torch.float32 and not product.requires_grad
    n, q = expected[2], inputs[0][:, -1]
    torch.testing.assert_close(product[:, -1], (n * q).sum(-1) * q.shape[-1] ** -0.5)
    unused = forward(*inputs, *states, **{**KEYWORDS, "normalize": False})[4]
    assert torch.equal(unused, torch.zeros_like(unused))


def test_gradients_of_forward_are_those_of_chunkwise():
    a, b = leaves(make()), leaves(make())
    ours = torch.autograd.grad(forward(*a, None, None, None, **KEYWORDS)[0].square().sum(), a)
    expected = torch.autograd.grad(chunkwise(*b)[0].square().sum(), b)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected))


def test_compiles():
    function = torch.compile(lambda *x: chunkwise(*x)[0].square().sum(), backend="aot_eager", fullgraph=True)
    a, b = leaves(make(dtype=torch.float32)), leaves(make(dtype=torch.float32))
    function(*a).backward()
    chunkwise(*b)[0].square().sum().backward()
    for x, y in zip(a, b):
        torch.testing.assert_close(x.grad, y.grad)


def test_autocast_keeps_gates_and_states():
    inputs = leaves(make(dtype=torch.float32))
    states = [x.float() for x in make_states()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c, n, m = chunkwise(*inputs, *states)
    assert h.dtype == torch.bfloat16 and {c.dtype, n.dtype, m.dtype} == {torch.float32}
    low = [x.bfloat16() for x in inputs[:3]]
    expected = chunkwise(*low, *inputs[3:], *states)
    assert torch.equal(h, expected[0]) and torch.equal(c, expected[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(forward(*inputs, *states, **KEYWORDS)[0], h)
    h.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_step_writes_in_place():
    inputs = [x[:, 0] for x in make(dtype=torch.float32)]
    state = [torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3), torch.zeros(2, 2)]
    versions = [x._version for x in state]
    h = step(*inputs, *state)
    expected = chunkwise(*(x[:, None] for x in inputs))
    for x, y in zip((h, *state), (expected[0][:, 0], *expected[1:])):
        torch.testing.assert_close(x, y)
    assert all(x._version > before for x, before in zip(state, versions))


def test_step_has_no_derivative():
    inputs = leaves([x[:, 0] for x in make(dtype=torch.float32)])
    state = [torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3), torch.zeros(2, 2)]
    h = step(*inputs, *state)
    with pytest.raises(RuntimeError, match="mlstm_step has no derivative"):
        h.sum().backward()
    with pytest.raises(RuntimeError, match="mlstm_step: c, n, m: expected states without gradient"):
        step(*inputs, *leaves(state))


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_part_of_a_state_is_an_error(gate, normalize):
    inputs, (c, n, m) = make(), make_states()
    needed = "c" + "n" * normalize + "m" * (gate == "exp")
    for given in ("", "c", "n", "m", "cn", "cm", "nm", "cnm"):
        states = [state if name in given else None for name, state in zip("cnm", (c, n, m))]
        if len(set(given) & set(needed)) in (0, len(needed)):
            chunkwise(*inputs, *states, input_gate=gate, normalize=normalize)
            continue
        got = ", got" + "".join(f" {name}0" for name in given)
        with pytest.raises(RuntimeError, match=f"mlstm_chunkwise: c0, n0 and m0: expected all or none.*{got}$"):
            chunkwise(*inputs, *states, input_gate=gate, normalize=normalize)


def test_errors_name_the_argument():
    q, k, v, i, f = make()
    with pytest.raises(RuntimeError, match=r"mlstm_chunkwise: k: expected \(B,T,NH,DQK\) = \[2, 7, 2, 3\], got"):
        chunkwise(q, k[..., :2], v, i, f)
    with pytest.raises(RuntimeError, match="mlstm_chunkwise: q: expected 4 dimensions, got 3"):
        chunkwise(q[0], k, v, i, f)
    with pytest.raises(RuntimeError, match="mlstm_chunkwise: v: expected dtype Double, got Float"):
        chunkwise(q, k, v.float(), i, f)
    h, _, _, _, product = forward(q, k, v, i, f, None, None, None, **KEYWORDS)
    rest = (None, None, q, k, v, i, f, None, None, None)
    with pytest.raises(RuntimeError, match=r"mlstm_chunkwise_backward: product: expected \(B,T,NH\) = \[2, 7, 2\]"):
        backward(h, *rest, h, product[:, :3], **KEYWORDS)
    with pytest.raises(RuntimeError, match=r"mlstm_chunkwise_backward: dh: expected \(B,T,NH,DV\)"):
        backward(h[..., :1], *rest, h, product, **KEYWORDS)
