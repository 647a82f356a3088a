"""Matrices of 8 bits: the operators from Python, models whose weights are rounded to them, and the programs that load such."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import libxlstm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import TinyRun, program  # noqa: E402

ops = torch.ops.xlstm
SETTINGS = {"model": {"vocab_size": 300, "embedding_dim": 128, "num_blocks": 3, "num_heads": 4, "slstm_at": [1]}}
KINDS = {
    "xlstm": SETTINGS,
    "xlstm_large": {"model": {"kind": "xlstm_large", "vocab_size": 300, "embedding_dim": 128, "num_blocks": 2, "num_heads": 64,
                              "qk_dim_factor": 1.0}},
    "llama": {"model": {"kind": "llama", "vocab_size": 300, "embedding_dim": 128, "num_blocks": 2, "num_heads": 4}},
    "hyena": {"model": {"kind": "hyena", "vocab_size": 300, "embedding_dim": 128, "num_blocks": 2}},
}


def make_model(settings=SETTINGS, seed=1):
    torch.manual_seed(seed)
    return libxlstm.make_model(settings).eval()


def kept_in_int8(model):
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.int8}


def exact_twin(model):
    """A float32 model with the values that a model of 8 bits stands for."""
    twin = libxlstm.make_model(model.settings).eval()
    with torch.no_grad():
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            theirs.copy_(ops.dequantize_int8(ours, theirs.size(1)) if ours.dtype == torch.int8 else ours)
    return twin


def test_opcheck():
    weight = ops.quantize_int8(torch.randn(7, 20))
    torch.library.opcheck(ops.quantize_int8.default, (torch.randn(7, 20),))
    torch.library.opcheck(ops.dequantize_int8.default, (weight, 20), {"dtype": torch.bfloat16})
    torch.library.opcheck(ops.linear_int8.default, (torch.randn(2, 3, 20, requires_grad=True), weight,
                                                    torch.randn(7, requires_grad=True)))
    torch.library.opcheck(ops.linear_int8.default, (torch.randn(40, 20), weight))


def test_gradients_are_those_of_the_matrix_that_is_kept():
    weight = ops.quantize_int8(torch.randn(6, 9))
    x, bias = torch.randn(2, 5, 9, dtype=torch.double, requires_grad=True), torch.randn(6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear_int8(x, weight, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: ops.linear_int8(x, weight).square(), x)
    y = ops.linear_int8(x.detach().bfloat16().requires_grad_(), weight, bias.float())
    assert y.dtype == torch.bfloat16
    gradient, = torch.autograd.grad(y.float().sum(), bias)
    assert gradient.dtype == torch.double and gradient.eq(10).all()


def test_autocast_takes_x_along():
    weight = ops.quantize_int8(torch.randn(6, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_int8(torch.randn(2, 9), weight).dtype == torch.bfloat16


def test_compiled_with_any_number_of_rows():
    weight, bias = ops.quantize_int8(torch.randn(6, 9)), torch.randn(6)
    compiled = torch.compile(lambda x: ops.linear_int8(x, weight, bias), backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (1, 4, 30):
        x = torch.randn(rows, 9)
        assert torch.equal(compiled(x), ops.linear_int8(x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_with_what_is_kept(kind):
    model = make_model(KINDS[kind])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    whole = model.num_parameters
    assert model.quantize() is model
    names = kept_in_int8(model)
    assert names and all(min(shapes[name]) >= 64 and len(shapes[name]) == 2 for name in names)
    assert not any(part in name for name in names for part in ("embedding", "lm_head", "igate", "fgate", "norm"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.int8, torch.bfloat16}
    assert model.num_parameters < 1.3 * whole  # 16 bytes for each row
    model.float()
    twin, ids = exact_twin(model), torch.randint(300, (2, 9))
    with torch.no_grad():
        logits, state = model(ids)
        torch.testing.assert_close(logits, twin(ids)[0], rtol=1e-4, atol=1e-4)
        first, half = model(ids[:, :8])
        torch.testing.assert_close(model(ids[:, 8:], half)[0], logits[:, 8:], rtol=1e-4, atol=1e-4)
    prompt = ids[0].tolist()
    assert model.generate(prompt, 20, temperature=0) == twin.generate(prompt, 20, temperature=0)
    before = [parameter.clone() for parameter in model.float().parameters()]
    for a, b in zip(before, model.quantize().parameters(), strict=True):  # what has 8 bits keeps them
        assert torch.equal(a, b) if a.dtype == torch.int8 else torch.equal(a.bfloat16(), b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_on_a_gpu_is_that_of_a_cpu(kind):
    """Its step is recorded after some tokens where the model allows that."""
    model, prompt = make_model(KINDS[kind]).quantize().float(), torch.randint(300, (9,)).tolist()
    expected = model.generate(prompt, 40, temperature=0)
    assert model.to("cuda").generate(prompt, 40, temperature=0) == expected
    half = model.bfloat16()
    drawn = half.generate(prompt, 40, seed=3)
    assert len(drawn) == 40 and drawn == half.generate(prompt, 40, seed=3)


def test_gradients_reach_what_is_in_front_of_the_matrices():
    model, ids = make_model().quantize().float(), torch.randint(300, (2, 9))
    twin = exact_twin(model)
    loss, other = model.loss(ids, ids.roll(-1, 1)), twin.loss(ids, ids.roll(-1, 1))
    loss.backward(), other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.dtype == torch.int8:
            assert not ours.requires_grad and ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=1e-5, msg=name)


def test_a_stack_and_copies():
    torch.manual_seed(1)
    stack = libxlstm.BlockStack(embedding_dim=64, num_blocks=2, num_heads=4).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        whole = stack(x)[0]
        stack.quantize().float()
        assert kept_in_int8(stack)
        assert 0 < (stack(x)[0] - whole).norm() / whole.norm() < 0.05
        twin = copy.deepcopy(stack)
        assert kept_in_int8(twin) == kept_in_int8(stack) and torch.equal(twin(x)[0], stack(x)[0])
        other = libxlstm.BlockStack(embedding_dim=64, num_blocks=2, num_heads=4).quantize().float().eval()
        other.load_state_dict(stack.state_dict())
        assert torch.equal(other(x)[0], stack(x)[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = TinyRun(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("shared"), steps=60, every=20)
    run.train("model.embedding_dim=128", check=0)
    return run


def test_a_run_loaded_in_8_bits(run, tmp_path):
    model, whole = libxlstm.load(run.path, dtype=torch.int8), libxlstm.load(run.path)
    assert kept_in_int8(model)
    for (name, ours), theirs in zip(model.named_parameters(), whole.quantize().parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    text = program("xlstm-generate", run.path, "--prompt", "the ", "--greedy", "--max-new-tokens", 50, "--dtype", "int8_weights",
                   "--no-echo", check=0).stdout
    assert text == bytes(model.generate(list(b"the "), 50, temperature=0)).decode(errors="replace") + "\n"
    losses = {}
    for dtype in ("float32", "bfloat16_weights", "int8_weights"):
        program("xlstm-eval", run.path, "--dtype", dtype, "--json", tmp_path / "eval.json", check=0)
        losses[dtype] = json.loads((tmp_path / "eval.json").read_text())["loss"]
    assert len(set(losses.values())) == 3
    assert max(losses.values()) - min(losses.values()) < 0.02
    judge = libxlstm.scoring.Judge.load(run.path, device="cpu", dtype="int8_weights")
    assert kept_in_int8(judge.model)


def test_8_bits_are_saved_and_run_but_not_trained(run, tmp_path):
    model = libxlstm.load(run.path, dtype=torch.int8)
    model.save(tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert size < 0.6 * next((Path(run.path) / "ckpt").glob("step-*/model.safetensors")).stat().st_size
    for dtype in (None, torch.bfloat16, torch.int8):
        again = libxlstm.load(tmp_path / "small", dtype=dtype)
        assert kept_in_int8(again) == kept_in_int8(model)
        for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs.to(ours.dtype)), name
    text = [program("xlstm-generate", folder, "--prompt", "the ", "--greedy", "--dtype", "int8_weights", check=0).stdout
            for folder in (run.path, tmp_path / "small")]
    assert text[0] == text[1]
    error = program("xlstm-train", run.config, "model.embedding_dim=128", f"train.init_from={tmp_path / 'small'}",
                    f"run.out_dir={tmp_path}", check=4).stderr
    assert "8 bits" in error and "rounded from" in error


def test_what_cannot_be_rounded_leaves_the_model_as_it_was():
    model = make_model()
    with torch.no_grad():
        model.get_parameter("blocks.2.mlstm.proj_up.weight")[3, 4] = float("nan")
    with pytest.raises(RuntimeError, match="inf or NaN"):
        model.quantize()
    assert not kept_in_int8(model)
