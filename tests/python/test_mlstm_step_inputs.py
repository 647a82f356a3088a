"""torch.ops.xlstm.mlstm_step_inputs against the operators that it stands for; opcheck; errors; models that
decode by it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import libxlstm

ops = torch.ops.xlstm
NAMES = ("a", "q", "k", "v", "igate", "fgate", "window")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(batch=3, channels=24, width=4, size=4, heads=2, biases=True, seed=0):
    """Arguments in float64, window last."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    given = [randn(batch, 2 * channels)[:, :channels], randn(channels, width), randn(channels) if biases else None]
    for _ in range(3):
        given += [randn(channels // size, size, size), randn(channels) if biases else None]
    for _ in range(2):
        given += [0.1 * randn(heads, 3 * channels), randn(heads)]
    return [*given, randn(batch, width - 1, channels)]


def to(given, *where):
    return [x if x is None else x.to(*where) for x in given]


def step(given):
    """NAMES -> tensors; `given` stays as it is."""
    window = given[-1].clone()
    return dict(zip(NAMES, (*ops.mlstm_step_inputs(*given[:-1], window), window), strict=True))


def separately(given):
    x, weight, bias, q, q_bias, k, k_bias, v, v_bias, igate, igate_bias, fgate, fgate_bias, window = given
    window = window.clone()
    a = ops.causal_conv1d_step(x, weight, bias, window, silu=True)
    qkv = ops.block_linear(a, q, q_bias), ops.block_linear(a, k, k_bias), ops.block_linear(x, v, v_bias)
    gates = torch.nn.functional.linear(torch.cat(qkv, -1), torch.cat([igate, fgate]), torch.cat([igate_bias, fgate_bias]))
    return dict(zip(NAMES, (a, *qkv, *gates.chunk(2, -1), window), strict=True))


CASES = [{}, {"size": 8, "width": 2}, {"size": 2, "width": 8, "biases": False}, {"size": 3, "heads": 5},
         {"size": 24, "batch": 1}, {"batch": 1, "heads": 1, "width": 3}, {"channels": 600, "heads": 7}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_separate_operators(case, dtype):
    given = to(make(**case), dtype)
    got, wanted = step(given), separately(given)
    for name in NAMES:
        assert got[name].dtype == dtype and got[name].is_contiguous(), name
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_convolution_may_have_a_type_of_its_own(dtype):
    given = to(make(), dtype)
    given[1:3] = to(make()[1:3], torch.float64)
    got, wanted = step(given), separately(given)
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


def test_a_window_of_any_strides():
    given, other = make(), make()
    other[-1] = other[-1].transpose(1, 2).contiguous().transpose(1, 2)
    kept = other[-1]
    out = ops.mlstm_step_inputs(*other)
    for name, x in zip(NAMES, (*out, kept), strict=True):
        torch.testing.assert_close(x, step(given)[name])


def test_autocast_changes_nothing():
    given = to(make(), torch.float32)
    wanted = step(given)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(given)
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


def test_opcheck():
    for case in ({}, {"biases": False}):
        torch.library.opcheck(ops.mlstm_step_inputs.default, tuple(to(make(**case), torch.float32)))


def test_no_derivative():
    given = to(make(), torch.float32)
    for place in (0, 1, 3, 9, 12):
        leaves = [x if i != place else x.clone().requires_grad_() for i, x in enumerate(given)]
        out = ops.mlstm_step_inputs(*leaves)
        assert all(x.requires_grad for x in out)
        with pytest.raises(RuntimeError, match="mlstm_step_inputs has no derivative"):
            out[4].sum().backward()
    with pytest.raises(RuntimeError, match="mlstm_step_inputs: window: expected a state without gradient"):
        ops.mlstm_step_inputs(*given[:-1], given[-1].clone().requires_grad_())


@pytest.mark.parametrize("place, change, match", [
    (0, lambda x: x[0], r"x: expected \(B,C\), got shape \[24\]"),
    (0, lambda x: x.int(), "x: expected float32, float64, bfloat16 or float16, got Int"),
    (1, lambda x: x[:, :1], "conv_weight: expected a width W of 2 to 8, got 1"),
    (1, lambda x: x[:5], r"conv_weight: expected \(C,W\) = \[24, 4\], got \[5, 4\]"),
    (2, lambda x: x[:5], r"conv_bias: expected \(C\) = \[24\], got \[5\]"),
    (3, lambda x: x[..., :0], r"q_weight: expected blocks \(C/S,S,S\) whose size S divides C = 24, got shape \[6, 4, 0\]"),
    (3, lambda x: x[:5], r"q_weight: expected \(C/S,S,S\) = \[6, 4, 4\], got \[5, 4, 4\]"),
    (3, lambda x: x.double(), "q_weight: expected dtype Float, got Double"),
    (4, lambda x: x[:5], r"q_bias: expected \(C\) = \[24\], got \[5\]"),
    (5, lambda x: x[:, :3], r"k_weight: expected \(C/S,S,S\) = \[6, 4, 4\], got \[6, 3, 4\]"),
    (8, lambda x: x.half(), "v_bias: expected dtype Float, got Half"),
    (9, lambda x: x[:, :24], r"igate_weight: expected \(NH,3\*C\) = \[2, 72\], got \[2, 24\]"),
    (10, lambda x: x[:1], r"igate_bias: expected \(NH\) = \[2\], got \[1\]"),
    (11, lambda x: x[:1], r"fgate_weight: expected \(NH,3\*C\) = \[2, 72\], got \[1, 72\]"),
    (12, lambda x: x.bfloat16(), "fgate_bias: expected dtype Float, got BFloat16"),
    (13, lambda x: x[:, 1:], r"window: expected \(B,W-1,C\) = \[3, 3, 24\], got \[3, 2, 24\]"),
    (13, lambda x: x.double(), "window: expected dtype Float, got Double"),
])
def test_errors_name_the_argument(place, change, match):
    given = to(make(), torch.float32)
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=f"mlstm_step_inputs: {match}"):
        ops.mlstm_step_inputs(*given)


class Names(TorchDispatchMode):
    """Of the operators of this library that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called += [function._schema.name.removeprefix("xlstm::")] * (function.namespace == "xlstm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_models_decode_by_it(fused, autocast):
    """Where the operators are fused, no autocast is on and there is a window: one token, after others."""
    torch.manual_seed(1)
    settings = {"embedding_dim": 16, "num_blocks": 1, "num_heads": 2, "vocab_size": 30, "fused": fused}
    model, ids = libxlstm.make_model({"model": settings}).eval(), torch.arange(12).view(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole, state = model(ids)[0], None
        for t in range(ids.size(1)):
            with Names() as names:
                logits, state = model(ids[:, t : t + 1], state)
            expected = fused and not autocast and t > 0
            assert names.called.count("mlstm_step_inputs") == expected
            assert ("causal_conv1d_step" in names.called) == (t > 0 and not expected)
            if not autocast:
                torch.testing.assert_close(logits[:, 0], whole[:, t])
