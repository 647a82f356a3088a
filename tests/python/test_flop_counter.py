"""torch.utils.flop_counter counts the operators, also those that C++ modules call, as the trainer counts (train/flops.h)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import libxlstm
from libxlstm.flops import FORMULAS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build" / "bin" / "xlstm-train"
BATCH, TIME, DIM, BLOCKS = 2, 12, 64, 3
ops = torch.ops.xlstm


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def step_flops(operator, *inputs, **options):
    """Of the forward pass without a graph, and of forward and backward pass of the first output."""
    with torch.no_grad():
        alone = flops(lambda: operator(*inputs, **options))
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]

    def step():
        out = operator(*inputs, **options)
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()

    return alone, flops(step)


def test_every_operator_has_a_formula():
    names = {schema.name.removeprefix("xlstm::") for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith("xlstm::")}
    assert names == set(FORMULAS)
    assert all(getattr(ops, name) in flop_registry for name in names)


def test_registration_waits_for_the_counter():
    """The counter takes longer to import than the package."""
    code = """
import sys, torch
{first}
import libxlstm
assert ("torch.utils.flop_counter" in sys.modules) is {given}
from torch.utils.flop_counter import flop_registry
assert torch.ops.xlstm.slstm_backward in flop_registry
import importlib
importlib.reload(libxlstm)
assert not any(type(finder).__module__ == "libxlstm.flops" for finder in sys.meta_path)
"""
    looked_up = "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter')"
    code_of_search = code.replace("from torch.utils.flop_counter", f"{looked_up}\nfrom torch.utils.flop_counter", 1)
    subprocess.run([sys.executable, "-c", code_of_search.format(first="", given=False)], check=True, timeout=300, cwd=ROOT)
    for first in ("", "import torch.utils.flop_counter"):
        subprocess.run([sys.executable, "-c", code.format(first=first, given=bool(first))], check=True, timeout=300, cwd=ROOT)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators(device):
    def tensor(*shape):
        return torch.randn(*shape, device=device)

    gates = tensor(2, 5, 3), tensor(2, 5, 3)
    memory = 4 * 2 * 5 * 3 * 8 * 16  # update and read
    q, k, v = tensor(2, 5, 3, 8), tensor(2, 5, 3, 8), tensor(2, 5, 3, 16)
    assert step_flops(ops.mlstm_chunkwise, q, k, v, *gates) == (memory, 3 * memory)
    assert step_flops(ops.gated_linear_attention, q, k, v, -tensor(2, 5, 3, 8).abs()) == (memory, 3 * memory)
    recurrence = 2 * 2 * 5 * 4 * 3 * 8 * 8
    assert step_flops(ops.slstm, tensor(2, 5, 4, 3, 8), tensor(4, 3, 8, 8), tensor(4, 3, 8)) == (recurrence, 3 * recurrence)
    conv = 2 * 2 * 5 * 6 * 4
    assert step_flops(ops.causal_conv1d, tensor(2, 5, 6), tensor(6, 4), tensor(6), silu=True) == (conv, 3 * conv)
    linear = 2 * 2 * 5 * 3 * 8 * 4
    assert step_flops(ops.block_linear, tensor(2, 5, 12), tensor(3, 8, 4)) == (linear, 3 * linear)
    scan = 2 * 2 * 5 * 6 * 4
    inputs = tensor(2, 5, 6), tensor(2, 5, 6).abs(), -tensor(6, 4).abs(), tensor(2, 5, 4), tensor(2, 5, 4), tensor(6)
    assert step_flops(ops.selective_scan, *inputs) == (scan, 3 * scan)
    assert step_flops(ops.gated_scan, tensor(2, 5, 6), tensor(2, 5, 6).sigmoid()) == (0, 0)
    assert step_flops(ops.wkv, tensor(2, 5, 6), tensor(2, 5, 6), tensor(6).abs(), tensor(6)) == (0, 0)
    assert step_flops(ops.headwise_norm, tensor(2, 5, 3, 8)) == (0, 0)
    assert step_flops(ops.residual_norm, tensor(2, 5, 6), tensor(2, 5, 6)) == (0, 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_head(reduction):
    """Gradients come with the loss but for single ones, whose logits are computed again, which does not count."""
    head = 2 * 2 * 5 * 8 * 30
    inputs = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(30, (2, 5))
    assert step_flops(ops.linear_cross_entropy, *inputs, reduction=reduction) == (head, 3 * head)
    x = inputs[0].requires_grad_()  # the weight is frozen
    if reduction != "none":
        assert flops(lambda: ops.linear_cross_entropy(*inputs, reduction=reduction).backward()) == 2 * head
    assert x.grad is None or x.grad.shape == x.shape


def test_steps():
    memory = 4 * 2 * 3 * 8 * 16
    q, v, gates, c = torch.randn(2, 3, 8), torch.randn(2, 3, 16), torch.randn(2, 3), torch.zeros(2, 3, 8, 16)
    n, m = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    ring = torch.zeros(2, 3, 16, 8), torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 2), torch.zeros(2, 3, dtype=torch.int32)
    assert flops(lambda: ops.mlstm_step(q, q, v, gates, gates, c, n, m)) == memory
    assert flops(lambda: ops.mlstm_step_lazy(q, q, v, gates, gates, c, n, m, *ring)) == memory
    assert flops(lambda: ops.mlstm_fold(c, n, m, *ring)) == 0
    x, weight = torch.randn(2, 6), torch.randn(6, 4)
    maps, gate, bias = (torch.randn(3, 2, 2), None) * 3, torch.randn(3, 18), torch.randn(3)
    inputs = 2 * 2 * (6 * 4 + 3 * 3 * 2 * 2 + 2 * 3 * 18)
    assert flops(lambda: ops.mlstm_step_inputs(x, weight, None, *maps, gate, bias, gate, bias, torch.zeros(2, 3, 6))) == inputs
    assert flops(lambda: ops.causal_conv1d_step(x, weight, None, torch.zeros(2, 3, 6))) == 2 * 2 * 6 * 4


def counted(settings, device="cpu", autocast=False, time=TIME):
    """Forward pass and training step per token."""
    model, ids = libxlstm.make_model({"model": settings}).to(device), torch.randint(256, (BATCH, time), device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            forward = flops(lambda: model(ids))
        step = flops(lambda: model.loss(ids, ids).backward())
    return forward / (BATCH * time), step / (BATCH * time)


def described(settings, folder, time=TIME):
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model": settings, "data": {"seq_len": time}}))
    done = subprocess.run([PROGRAM, config, "--describe"], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)["forward_flops_per_token"]


def small(kind, **others):
    return {"kind": kind, "embedding_dim": DIM, "num_blocks": BLOCKS, "num_heads": 2, **others}


needs_program = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")


@needs_program
@pytest.mark.parametrize("settings", [
    small("xlstm", slstm_at=[1]), small("xlstm", slstm_at=[1], fused=False), small("xlstm", mlstm={"up_projection": "post"}),
    small("xlstm", slstm_at=[0, 2], slstm={"cell": "lstm", "gate_proj": "dense", "recompute": True}, tie_weights=True),
    *map(small, ("xlstm_large", "lstm", "lstm_block", "mamba", "rwkv4", "rwkv6", "linear_attention", "retnet", "gla")),
], ids=lambda settings: settings["kind"])
def test_models_count_as_the_trainer_says(settings, tmp_path):
    """h3 and hyena are left out: the trainer leaves out their convolutions over the sequence, whose filters are products."""
    forward = described(settings, tmp_path)
    assert counted(settings) == (forward, 3 * forward)
    assert counted(settings, autocast=True) == (forward, 3 * forward)


@needs_program
def test_what_is_computed_again_counts_again(tmp_path):
    """Counters see what runs, the trainer says what the model needs."""
    settings = small("xlstm", slstm_at=[1])
    forward = described(settings, tmp_path)
    head = 2 * DIM * 256
    assert counted({**settings, "activation_checkpointing": True}) == (forward, 4 * forward - head)


@needs_program
def test_many_tokens_meet_fewer_weights_of_gates(tmp_path):
    """From 32 tokens on the fused mLSTM multiplies the gates' weights (2 NH,3 I) of q, k and v by the projections' blocks of
    4, once per call, after which tokens meet 2 I columns in place of 3 I."""
    settings, inner = small("xlstm"), 2 * DIM
    forward = described(settings, tmp_path, time=64)
    per_token, once = 2 * 4 * inner, 3 * 2 * 4 * inner * 4
    expected = forward - BLOCKS * (per_token - once / (BATCH * 64))
    assert counted(settings, time=64) == (expected, 3 * expected)
    assert counted({**settings, "fused": False}, time=64) == (forward, 3 * forward)


@needs_program
@pytest.mark.parametrize("kind", ["hgrn", "hgrn2"])
def test_bounds_of_gates_meet_no_token(kind, tmp_path):
    """Two-dimensional, so that the trainer takes them for a matrix."""
    forward = described(small(kind), tmp_path) - 2 * BLOCKS * DIM
    assert counted(small(kind)) == (forward, 3 * forward)


@needs_program
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_torch_counts_all_pairs_of_attention(kind, tmp_path):
    """The trainer counts those of a token with the ones before it, torch all, and five products of them in the backward pass,
    of which one computes the scores again."""
    pairs = BLOCKS * 4 * DIM
    forward = described(small(kind), tmp_path) - pairs * (TIME + 1) / 2
    assert counted(small(kind)) == (forward + pairs * TIME, 3 * forward + pairs * TIME * (1 + 2.5))


def test_decoding_counts_a_token():
    model = libxlstm.make_model({"model": small("xlstm", slstm_at=[1])}).eval()
    ids = torch.randint(256, (1, 2))
    with torch.no_grad():
        one = flops(lambda: model(ids[:, :1]))
        state = model(ids[:, :1])[1]
        assert flops(lambda: model(ids[:, 1:], state)) == one
        read = flops(lambda: model.generate([1], 1, temperature=0))
        assert read == one and flops(lambda: model.generate([1], 5, temperature=0)) == 5 * one


def test_operators_in_a_graph_count_once():
    """What a call records for its backward pass stands in its place."""
    stack = libxlstm.BlockStack(embedding_dim=DIM, num_blocks=1)
    x = torch.randn(1, TIME, DIM)
    with torch.no_grad():
        forward = flops(lambda: stack(x))
    counter = FlopCounterMode(display=False)
    with counter:
        stack(x.requires_grad_())[0].sum().backward()
    assert counter.get_total_flops() == 3 * forward
    operators = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert operators["xlstm.mlstm_chunkwise_backward"] == 2 * operators["xlstm.mlstm_chunkwise_forward"] > 0
    assert "xlstm.mlstm_chunkwise" not in operators


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_counts_the_same(autocast):
    settings = small("xlstm", slstm_at=[1])
    assert counted(settings, "cuda", autocast) == counted(settings, "cpu", autocast)
