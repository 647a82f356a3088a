"""torch.ops.xlstm.slstm: gradcheck, opcheck, packages that compute the same, low precision, errors."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libxlstm  # noqa: F401  registers the operators

CELLS = ["slstm", "slstm_expf", "lstm"]
STATE_NAMES = ("y0", "c0", "n0", "m0")
slstm = torch.ops.xlstm.slstm


def make(batch, time, heads, dh, *, states=False, count=None, dtype=torch.float64, spread=1.5, gate_dim=2, seed=0):
    """(wx, r, b, states) with wx's gate axis at gate_dim of the memory."""
    g = torch.Generator().manual_seed(seed)
    sizes = [batch, time, heads, dh]
    sizes.insert(gate_dim, 4)
    random = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    wx = (random(*sizes) * spread).to(dtype).movedim(gate_dim, 2)
    r = (random(4, heads, dh, dh) * dh**-0.5).to(dtype)
    b = random(4, heads, dh).to(dtype)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (count or batch, heads, dh)
    state = [random(*shape), random(*shape), random(*shape).abs() + 0.5, random(*shape)] if states else []
    return wx, r, b, [s.to(state_dtype) for s in state]


class Recurrent(torch.autograd.Function):
    """y as the next step's recurrent product sees it: its gradient is bounded, or cut off."""

    @staticmethod
    def forward(ctx, y, clip, cut):
        ctx.clip, ctx.cut = clip, cut
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        if ctx.cut:
            return torch.zeros_like(dy), None, None
        return (dy.clamp(-ctx.clip, ctx.clip) if ctx.clip else dy), None, None


def aten(wx, r, b, states, cell, reset=None, clip=0.0, cut=False, final=False):
    """The cell by plain ATen operators, everything in the dtype of the arguments. final: the last y, c, n
    as well, in units of an m that is a constant."""
    batch, time, _, heads, dh = wx.shape
    empty = [wx.new_full((batch, heads, dh), v) for v in (0.0, 0.0, 0.0, -torch.inf)]
    y, c, n, m = [s.to(wx.dtype) for s in states] or empty
    out = []
    for t in range(time):
        if reset is not None:
            y, c, n, m = (torch.where(reset[:, t, None, None], e, s) for e, s in zip(empty, (y, c, n, m)))
        recurrent = Recurrent.apply(y, clip, cut) if clip or cut else y
        i, f, z, o = (wx[:, t] + torch.einsum("ghoi,bhi->bgho", r, recurrent) + b).unbind(1)
        if cell == "lstm":
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
            y = torch.sigmoid(o) * torch.tanh(c)
        else:
            log_f = F.logsigmoid(f) if cell == "slstm" else f
            m_new = torch.maximum(log_f + m, i)
            m_new = m_new.detach() if final else m_new
            i, f = torch.exp(i - m_new), torch.exp(log_f + m - m_new)
            c, n, m = f * c + i * torch.tanh(z), f * n + i, m_new
            y = torch.sigmoid(o) * c / n
        out.append(y)
    return (torch.stack(out, 1), y, c, n) if final else torch.stack(out, 1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "time, states, resets, cu, gate_dim, spread",
    [
        (0, True, False, None, 2, 1.0),
        (1, True, True, None, 4, 1.0),
        (7, False, True, None, 3, 1.0),
        (18, True, True, None, 4, 1.0),
        (19, True, True, [0, 0, 5, 17, 19], 2, 1.0),
        (5, True, False, None, 0, 6.0),
    ],
)
def test_gradcheck(cell, time, states, resets, cu, gate_dim, spread):
    batch = 1 if cu else 2
    wx, r, b, state = make(batch, time, 2, 3, states=states, count=cu and len(cu) - 1, gate_dim=gate_dim, spread=spread)
    options = {"cell": cell}
    if resets:
        options["reset"] = torch.rand(batch, time, generator=torch.Generator().manual_seed(1)) < 0.3
    if cu:
        options["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
    m0 = state[3:]
    m_base = slstm(wx, r, b, *state, **options)[4]

    def op(wx, r, b, *start):
        y, y_last, c, n, m = slstm(wx, r, b, *start, *m0, **options)
        if cell == "lstm":
            return y, y_last, c
        scale = torch.where(m == m_base, 1, torch.exp(m - m_base))  # c and n count in units of e^m, a constant
        return y, y_last, c * scale, n * scale

    inputs = [t.detach().requires_grad_() for t in (wx, r, b, *state[:3])]
    assert torch.autograd.gradcheck(op, inputs, atol=1e-7, rtol=1e-5, nondet_tol=0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    wx, r, b, state = make(3, 18, 2, 5, states=True, dtype=torch.float32)
    wx_last, *_ = make(3, 18, 2, 5, gate_dim=4, dtype=torch.float32)
    reset = torch.rand(3, 18) < 0.2
    leaf = lambda *ts: [t.detach().requires_grad_() for t in ts]  # noqa: E731
    torch.library.opcheck(slstm.default, (*leaf(wx, r, b),), {"cell": cell})
    torch.library.opcheck(slstm.default, (*leaf(wx_last, r, b, *state[:3]), state[3]), {"cell": cell, "reset": reset})
    packed, _, _, start = make(1, 20, 2, 5, states=True, count=3, dtype=torch.float32)
    cu = torch.tensor([0, 4, 4, 20], dtype=torch.int32)
    torch.library.opcheck(slstm.default, (*leaf(packed, r, b), *start), {"cell": cell, "cu_seqlens": cu})
    changed = {"cell": cell, "recompute": True, "recurrent_clip": 0.1, "recurrent_cut": False}
    torch.library.opcheck(slstm.default, (*leaf(wx_last, r, b, *state[:3]), state[3]), changed | {"reset": reset})

    forward = torch.ops.xlstm.slstm_forward.default
    backward = torch.ops.xlstm.slstm_backward.default
    common = {"reset": reset, "cu_seqlens": None, "cell": cell, "recurrent_clip": 0.5, "recurrent_cut": False}
    for recompute in (False, True):
        options = common | {"recompute": recompute, "preactivations": False}
        torch.library.opcheck(forward, (*leaf(wx, r, b), *state), options)
        y, _, c, n, _, gates, checkpoints = forward(wx, r, b, *state, **options)
        kept = (wx, r, b, *state) if recompute else (None, r, None, *state[:3], None)
        for gate_dim in (0, 2, 3, 4):
            arguments = (y, None, c, n, y, gates, checkpoints, *kept)
            torch.library.opcheck(backward, arguments, common | {"gate_dim": gate_dim})


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_on_other_devices(cell):
    """What the operators promise about results they cannot compute here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        wx = torch.empty(3, 18, 2, 5, 4, device="cuda", dtype=torch.bfloat16).movedim(-1, 2)
        r, b = (torch.empty(*s, device="cuda") for s in ((4, 2, 5, 5), (4, 2, 5)))
        for recompute in (False, True):
            y, *last = slstm(wx, r, b, cell=cell, recompute=recompute)
            assert y.shape == (3, 18, 2, 5) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
            assert all(s.shape == (3, 2, 5) and s.dtype == torch.float32 for s in last)
            options = {"reset": None, "cu_seqlens": None, "cell": cell, "recurrent_clip": 0.0, "recurrent_cut": False}
            *_, gates, checkpoints = torch.ops.xlstm.slstm_forward(
                wx, r, b, None, None, None, None, recompute=recompute, preactivations=True, **options)
            assert gates.shape == ((0,) if recompute else wx.shape) and gates.dtype == torch.float32
            assert checkpoints.shape == (6, 2, 1 if cell == "lstm" else 3, 5)
            kept = (wx, r, b) if recompute else (None, r, None)
            dwx, dr, db, *_ = torch.ops.xlstm.slstm_backward(
                y, None, None, None, y, gates, checkpoints, *kept, None, None, None, None, gate_dim=4, **options)
            assert dwx.shape == wx.shape and dwx.stride() == wx.stride() and dwx.dtype == wx.dtype
            assert dr.shape == r.shape and db.shape == b.shape


def gradients_with(clip, cut, cell, recompute, resets, cu, gate_dim):
    """(ours, the plain loop's) gradients of a random function of y and the last states; cu: documents as rows of a loop."""
    lengths = [b - a for a, b in zip(cu, cu[1:])] if cu else None
    batch, time = (1, cu[-1]) if cu else (3, 21)
    wx, r, b, state = make(batch, time, 2, 5, states=True, count=len(lengths) if cu else None, gate_dim=gate_dim, spread=3.0)
    g = torch.Generator().manual_seed(9)
    reset = torch.rand(batch, time, generator=g) < 0.1 if resets else None
    weight = torch.randn(batch, time, 2, 5, generator=g, dtype=torch.float64) * 3
    ends = [torch.randn(state[0].shape, generator=g, dtype=torch.float64) for _ in range(3)]
    inputs = [t.detach().requires_grad_() for t in (wx, r, b, *state[:3])]
    wanted = inputs[:5] if cell == "lstm" else inputs
    cu_seqlens = torch.tensor(cu, dtype=torch.int32) if cu else None
    y, *last = slstm(*inputs, state[3], reset=reset, cu_seqlens=cu_seqlens, cell=cell, recompute=recompute,
                     recurrent_clip=clip, recurrent_cut=cut)[:4]
    used = 2 if cell == "lstm" else 3
    loss = (y * weight).sum() + sum((a * e).sum() for a, e in zip(last[:used], ends))
    ours = torch.autograd.grad(loss, wanted)
    loss = 0.0
    for n in range(len(lengths) if cu else 1):
        rows, tokens = (slice(n, n + 1), slice(cu[n], cu[n + 1])) if cu else (slice(None), slice(None))
        if cu and lengths[n] == 0:
            y, last = wx[:, :0, 0], [s[rows] for s in inputs[3:]]
        else:
            start = [s[rows] for s in (*inputs[3:], state[3])]
            y, *last = aten(inputs[0][:, tokens], inputs[1], inputs[2], start, cell,
                            reset=None if reset is None else reset[:, tokens], clip=clip, cut=cut, final=True)
            loss = loss + (y * weight[:, tokens]).sum()
        loss = loss + sum((a * e[rows]).sum() for a, e in zip(last[:used], ends))
    return ours, torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("clip, cut", [(0.3, False), (0.0, True), (0.3, True), (1e6, False)])
@pytest.mark.parametrize("recompute", [False, True])
def test_clip_and_cut_equal_a_plain_loop(cell, clip, cut, recompute):
    for resets, cu, gate_dim in ((True, None, 4), (False, [0, 0, 17, 18, 40], 2)):
        true = gradients_with(0.0, False, cell, recompute, resets, cu, gate_dim)[0]
        ours, loop = gradients_with(clip, cut, cell, recompute, resets, cu, gate_dim)
        for a, e, t in zip(ours, loop, true):
            assert (a - e).norm() <= 1e-12 * e.norm()
            if clip == 1e6:
                assert torch.equal(a, t)
        assert clip == 1e6 or all((a - t).norm() > 1e-3 * t.norm() for a, t in zip(ours, true))


def test_cut_leaves_y0_without_gradient():
    wx, r, b, state = make(2, 5, 2, 3, states=True)
    y0 = state[0].requires_grad_()
    y = slstm(wx, r.requires_grad_(), b, *state, recurrent_cut=True)[0]
    dy0, dr = torch.autograd.grad(y.sum(), (y0, r))
    assert not dy0.any() and dr.any()


@pytest.mark.parametrize("cell", CELLS)
def test_a_nan_gradient_stays_in_its_document(cell):
    wx, r, b, _ = make(1, 6, 2, 3)
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 3] = True
    dy = torch.ones(1, 6, 2, 3, dtype=torch.float64)
    dy[0, 4] = torch.nan
    (dwx,) = torch.autograd.grad(slstm(wx.requires_grad_(), r, b, reset=reset, cell=cell)[0], wx, dy)
    assert dwx[0, :3].isfinite().all() and dwx[0, :3].any() and dwx[0, 3:5].isnan().any()


@pytest.mark.parametrize("cell", CELLS)
def test_two_halves_equal_one_pass(cell):
    wx, r, b, state = make(3, 21, 2, 7, states=True)
    whole = slstm(wx, r, b, *state, cell=cell)
    first = slstm(wx[:, :8], r, b, *state, cell=cell)
    second = slstm(wx[:, 8:], r, b, *first[1:], cell=cell)
    assert torch.equal(torch.cat([first[0], second[0]], 1), whole[0])
    for a, e in zip(second[1:], whole[1:]):
        assert torch.equal(a, e)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error(cell, dtype):
    """At most twice the error of ATen in the same precision, both against float64 on the same rounded inputs."""
    wx, r, b, _ = make(4, 24, 2, 24, dtype=dtype, gate_dim=4)
    weight = torch.randn(4, 24, 2, 24, dtype=torch.float64)

    def run(f, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (wx, r, b)]
        y = f(*inputs)
        return [y.detach().double()] + [g.double() for g in torch.autograd.grad(y, inputs, weight.to(dtype))]

    by_aten = lambda *inputs: aten(*inputs, [], cell)  # noqa: E731
    exact = run(by_aten, torch.float64)
    same = run(by_aten, dtype)
    ours = run(lambda *inputs: slstm(*inputs, cell=cell)[0], dtype)
    for o, s, e in zip(ours, same, exact):
        assert (o - e).norm() <= 2 * (s - e).norm()
        assert (o - e).abs().max() <= 2 * (s - e).abs().max()


def test_autocast_and_compile():
    wx, r, b, state = make(2, 9, 2, 8, states=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_last, *_ = slstm(wx, r, b, *[s.bfloat16() for s in state])
    expected = slstm(wx.bfloat16(), r.bfloat16(), b, *[s.bfloat16().float() for s in state])
    assert y.dtype == torch.bfloat16 and y_last.dtype == torch.float32
    assert torch.equal(y, expected[0])

    def f(wx, r, b):
        return slstm(wx.tanh(), r, b)[0].square().sum()

    inputs = [t.requires_grad_() for t in (wx, r, b)]
    eager = torch.autograd.grad(f(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, e in zip(compiled, eager):
        assert torch.equal(a, e)


def test_lstm_equals_torch():
    """torch.nn.LSTM has gates i, f, g, o and two biases."""
    torch.manual_seed(0)
    batch, time, dim, dh = 3, 33, 6, 10
    lstm = nn.LSTM(dim, dh, batch_first=True, dtype=torch.float64)
    x = torch.randn(batch, time, dim, dtype=torch.float64, requires_grad=True)
    y0, c0 = (torch.randn(batch, 1, dh, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected, (y_last, c_last) = lstm(x, (y0.movedim(1, 0), c0.movedim(1, 0)))

    wx = (x @ lstm.weight_ih_l0.T).view(batch, time, 4, 1, dh)
    r = lstm.weight_hh_l0.view(4, 1, dh, dh)
    b = (lstm.bias_ih_l0 + lstm.bias_hh_l0).view(4, 1, dh)
    y, y_end, c_end, n, m = slstm(wx, r, b, y0, c0, cell="lstm")
    torch.testing.assert_close(y[:, :, 0], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(y_end, y_last.movedim(0, 1), rtol=0, atol=1e-13)
    torch.testing.assert_close(c_end, c_last.movedim(0, 1), rtol=0, atol=1e-13)
    assert not n.any() and not m.any()

    weight = torch.randn_like(expected)
    wanted = [x, y0, c0, *lstm.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y[:, :, 0], wanted, weight), torch.autograd.grad(expected, wanted, weight)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", ["slstm", "lstm"])
def test_equals_xlstm_package(cell):
    vanilla = pytest.importorskip("xlstm.blocks.slstm.src.vanilla")
    batch, time, heads, dh = 3, 20, 2, 6
    wx, r, b, _ = make(batch, time, heads, dh)
    inputs = [t.requires_grad_() for t in (wx, r, b)]
    states, _, _ = vanilla.slstm_forward(
        wx.transpose(0, 1).reshape(time, batch, 4 * heads * dh),
        torch.zeros(4 if cell == "slstm" else 2, batch, heads * dh, dtype=torch.float64),
        r.transpose(0, 1).reshape(heads, 4 * dh, dh),
        b.reshape(-1),
        vanilla.slstm_pointwise_function_registry[cell],
    )
    expected = states[0, 1:].view(time, batch, heads, dh).transpose(0, 1)
    y, _, c, n, m = slstm(*inputs, cell=cell)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    if cell == "slstm":
        for ours, theirs in zip((c, n, m), states[1:, -1]):
            torch.testing.assert_close(ours, theirs.view(batch, heads, dh), rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, weight), torch.autograd.grad(expected, inputs, weight)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_equals_xlstm_cell_module():
    """The package's module, with its own layouts: kernel (NH,DH_in,4,DH_out) and bias (NH,4,DH) outside."""
    module = pytest.importorskip("xlstm.blocks.slstm.cell")
    config = module.sLSTMCellConfig(
        hidden_size=24, num_heads=3, backend="vanilla", dtype="float32", recurrent_weight_init="standard"
    )
    cell = module.sLSTMCell(config)
    x = torch.randn(2, 15, 3, 4, 8)
    with torch.no_grad():
        expected = cell(x.permute(0, 1, 3, 2, 4).reshape(2, 15, -1))[0]
        r = cell._recurrent_kernel_int2ext(cell._recurrent_kernel).permute(2, 0, 3, 1)
        b = cell._bias_int2ext(cell._bias).transpose(0, 1)
        y = slstm(x.transpose(2, 3), r, b)[0]
    torch.testing.assert_close(y, expected.reshape(2, 3, 15, 8).transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("cell", ["slstm", "lstm"])
def test_equals_flashrnn(cell):
    vanilla = pytest.importorskip("flashrnn.flashrnn.vanilla")
    batch, time, heads, dh = 2, 13, 3, 5
    wx, r, b, _ = make(batch, time, heads, dh)
    inputs = [t.requires_grad_() for t in (wx, r, b)]
    states, _ = vanilla.flashrnn_forward(
        wx.transpose(0, 1),
        torch.zeros(1, batch, 4 if cell == "slstm" else 2, heads, dh, dtype=torch.float64),
        r.permute(1, 3, 0, 2),
        b,
        vanilla.flashrnn_pointwise_function_registry[cell],
    )
    expected = states[:, :, 0].transpose(0, 1)
    y = slstm(*inputs, cell=cell)[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    weight = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, weight), torch.autograd.grad(expected, inputs, weight)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import torch, test_slstm as t\n"
        "for cell in t.CELLS:\n"
        "    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):\n"
        "        wx, r, b, s = t.make(7, 19, 2, 21, dtype=dtype, gate_dim=4)\n"
        "        i = [x.requires_grad_() for x in (wx, r, b)]\n"
        "        y, e = t.slstm(*i, cell=cell)[0], t.aten(*i, s, cell)\n"
        "        assert (y - e).abs().max() < bound\n"
        "        for a, g in zip(torch.autograd.grad(y.sum(), i), torch.autograd.grad(e.sum(), i)):\n"
        "            assert (a - g).abs().max() < 20 * bound * g.abs().max(), (cell, dtype)\n"
    )
    folder = os.path.dirname(os.path.abspath(__file__))
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=folder)


def test_gradients_repeat_bit_by_bit():
    wx, r, b, state = make(5, 40, 3, 20, states=True, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (wx, r, b, *state[:3])]
    runs = [torch.autograd.grad(slstm(*inputs, state[3])[0].square().sum(), inputs) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, runs[0]))


def test_second_derivative_is_an_error():
    wx, r, b, _ = make(1, 3, 1, 2)
    y = slstm(wx.requires_grad_(), r, b)[0]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(y.sum(), wx, create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"recurrent_clip": -1.0}, r"recurrent_clip: expected 0 \(none\) or a positive number, got -1"),
        ({"recurrent_clip": float("nan")}, "recurrent_clip: expected 0"),
        ({"cell": "gru"}, 'cell: expected "slstm", "slstm_expf" or "lstm", got "gru"'),
        ({"wx": torch.zeros(2, 5, 3, 2, 4)}, r"wx: expected \(B,T,4,NH,DH\).*got \[2, 5, 3, 2, 4\]"),
        ({"wx": torch.zeros(2, 5, 4, 2, 4, dtype=torch.int64)}, "wx: expected float32.*got Long"),
        ({"r": torch.zeros(4, 2, 4, 5)}, r"r: expected \(4,NH,DH,DH\) = \[4, 2, 4, 4\], got \[4, 2, 4, 5\]"),
        ({"r": torch.zeros(4, 2, 4, 4, dtype=torch.float64)}, "r: expected dtype Float, got Double"),
        ({"b": torch.zeros(8, 4)}, r"b: expected \(4,NH,DH\) = \[4, 2, 4\]"),
        ({"y0": torch.zeros(2, 2, 4)}, "y0 and c0: expected both or neither, got only y0"),
        ({"y0": torch.zeros(2, 2, 4), "c0": torch.zeros(2, 2, 4)}, "y0, c0, n0 and m0: expected all or none"),
        ({name: torch.zeros(1, 2, 4) for name in STATE_NAMES}, r"y0: expected \(B,NH,DH\) = \[2, 2, 4\]"),
        ({name: torch.zeros(2, 2, 4).half() for name in STATE_NAMES}, "y0: expected dtype Float, got Half"),
        ({"reset": torch.zeros(2, 5)}, "reset: expected dtype Bool, got Float"),
        ({"reset": torch.zeros(5, 2, dtype=torch.bool)}, r"reset: expected \(B,T\) = \[2, 5\], got \[5, 2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens: expected int32 or int64, got Float"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, r"cu_seqlens: expected B = 1 \(one packed row\), got B = 2"),
        (
            {"wx": torch.zeros(1, 5, 4, 2, 4), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
            "cu_seqlens: expected to go from 0 to T = 5, got 0 to 4",
        ),
        (
            {"wx": torch.zeros(1, 5, 4, 2, 4), "cu_seqlens": torch.tensor([0, 4, 3, 5], dtype=torch.int32)},
            "cu_seqlens: expected no falling values, got 4 before 3",
        ),
    ],
)
def test_error_messages(change, message):
    arguments = {"wx": torch.zeros(2, 5, 4, 2, 4), "r": torch.zeros(4, 2, 4, 4), "b": torch.zeros(4, 2, 4)} | change
    with pytest.raises(RuntimeError, match=message):
        slstm(**arguments)


@pytest.mark.parametrize(
    "recompute, change, message",
    [
        (False, {"gate_dim": -1}, "gate_dim: expected the place of the gate axis, 0 to 4, got -1"),
        (False, {"gate_dim": 5}, "gate_dim: expected the place of the gate axis, 0 to 4, got 5"),
        (False, {"gates": torch.bfloat16}, "gates: expected dtype Float, got BFloat16"),
        (False, {"checkpoints": torch.float64}, "checkpoints: expected dtype Float, got Double"),
        (False, {"r": torch.float64}, "r: expected dtype Float, got Double"),
        (True, {"wx": torch.float16}, "wx: expected dtype Float, got Half"),
        (True, {"b": torch.float64}, "b: expected dtype Float, got Double"),
        (False, {"y": torch.int32}, "y: expected float32.*got Int"),
    ],
)
def test_error_messages_backward(recompute, change, message):
    """What autograd always gives, but a call of the operator itself may not: the kernels read bits as the type they expect."""
    wx, r, b, _ = make(1, 17, 2, 5, dtype=torch.float32)
    options = {"reset": None, "cu_seqlens": None, "cell": "slstm", "recurrent_clip": 0.0, "recurrent_cut": False}
    y, *_, gates, checkpoints = torch.ops.xlstm.slstm_forward(
        wx, r, b, None, None, None, None, recompute=recompute, preactivations=False, **options)
    given = {"dy": y, "y": y, "gates": gates, "checkpoints": checkpoints, "wx": wx if recompute else None, "r": r,
             "b": b if recompute else None, "gate_dim": 2} | options
    given |= {name: None for name in ("dy_last", "dc", "dn", *STATE_NAMES)}
    torch.ops.xlstm.slstm_backward(**given)
    given |= {name: given[name].to(new) if isinstance(new, torch.dtype) else new for name, new in change.items()}
    with pytest.raises(RuntimeError, match=f"^slstm_backward: {message}"):
        torch.ops.xlstm.slstm_backward(**given)
