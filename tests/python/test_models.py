"""The C++ models seen from Python."""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import libxlstm

YAML = """
model:
  vocab_size: 300
  embedding_dim: 32
  num_blocks: 3
  num_heads: 2
  slstm_at: [1]
"""
C = libxlstm._C
ROOT = Path(__file__).resolve().parents[2]


def make_model(seed=1):
    torch.manual_seed(seed)
    return libxlstm.make_model(YAML)


def random_ids(*shape):
    return torch.randint(300, shape)


def test_call_gives_logits_and_state():
    model = make_model()
    ids = random_ids(2, 11)
    with torch.no_grad():
        logits, state = model(ids)
        assert logits.shape == (2, 11, 300) and logits.dtype == torch.float32
        assert [len(block) for block in state] == [4, 5, 4]
        first, middle = model(ids[:, :6])
        second, last = model(ids[:, 6:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), logits, rtol=1e-4, atol=1e-5)
        for block, expected in zip(last, state):
            for tensor, other in zip(block, expected):
                torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)
        reset = torch.zeros(2, 11, dtype=torch.bool)
        reset[:, 6] = True
        torch.testing.assert_close(model(ids, None, reset)[0][:, 6:], model(ids[:, 6:])[0], rtol=1e-4, atol=1e-5)


def test_grad_mode_is_honoured():
    model = make_model()
    ids = random_ids(2, 7)
    assert model(ids)[0].requires_grad
    with torch.no_grad():
        assert not model(ids)[0].requires_grad
    with torch.inference_mode():
        assert not model(ids)[0].requires_grad


def test_parameters_share_storage_and_train():
    model = make_model()
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert {"embedding.weight", "blocks.0.mlstm.skip", "blocks.1.slstm.recurrent", "lm_head.weight"} <= set(parameters)
    ids = random_ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        parameters["lm_head.weight"].zero_()
        assert model(ids)[0].abs().max() == 0


def test_gradient_equals_that_of_the_logits():
    model = make_model()
    ids, targets = random_ids(2, 9), random_ids(2, 9)
    parameters = list(model.parameters())
    expected = torch.nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    loss = model.loss(ids, targets)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_save_and_load(tmp_path):
    model = make_model()
    C.save_model_folder(str(tmp_path / "model"), YAML, {k: v.detach() for k, v in model.named_parameters()})
    loaded = libxlstm.load(tmp_path / "model")
    assert not loaded.training and "embedding_dim: 32" in loaded.settings and loaded.folder == str(tmp_path / "model")
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])

    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(libxlstm.Error, match="model.safetensors") as caught:
        libxlstm.load(tmp_path / "model")
    assert caught.value.code == 4 and isinstance(caught.value, RuntimeError)
    libxlstm.load(tmp_path / "model", verify=False)


def test_to_moves_the_parameters_in_place(tmp_path):
    model = make_model()
    weight = next(model.parameters())
    ids = random_ids(2, 7)
    model.loss(ids, ids).backward()
    gradient = weight.grad.clone()
    assert model.to("cpu") is model and weight.dtype == torch.float32

    assert model.to(dtype=torch.float64) is model
    assert {p.dtype for p in model.parameters()} == {torch.float64} == {weight.dtype, weight.grad.dtype}
    assert torch.equal(weight.grad.float(), gradient)
    wide = model(ids)[0]
    assert wide.dtype == torch.float64
    model.to(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model(ids)[0], wide.float(), rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    assert weight.dtype == torch.bfloat16 and model(ids)[0].dtype == torch.float32
    for wrong, error, message in (({"dtype": torch.int64}, TypeError, "floating point"),
                                  ({"dtype": "bfloat16"}, TypeError, "to\\(\\)"),
                                  ({"device": "nowhere"}, RuntimeError, "nowhere")):
        with pytest.raises(error, match=message):
            model.to(**wrong)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for change in (lambda: model.to("meta"), lambda: model.to_empty(device="meta")):
        with pytest.raises(TypeError, match="a parameter on cpu cannot become a torch.strided tensor on meta"):
            change()
    assert model(ids)[0].device.type == "cpu"

    model.save(tmp_path / "model")
    # Half precision is kept in the file, and widened, exactly, where it is not wanted.
    loaded = libxlstm.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded = libxlstm.load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("length", [1, 96])
def test_autocast_with_fused_operators_is_as_near_to_float64_as_without(device, length):
    torch.manual_seed(12)
    settings = {"vocab_size": 300, "embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "slstm_at": []}
    models = [libxlstm.make_model({"model": settings | {"fused": fused}}) for fused in (True, False)]
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if "gate.weight" in name:
                parameter.copy_(torch.randn_like(parameter) / 8)
    models[1].load_state_dict(models[0].state_dict())
    exact = copy.deepcopy(models[1]).double()
    ids, targets = random_ids(2, length), random_ids(2, length)
    wanted = torch.autograd.grad(exact.loss(ids, targets), list(exact.parameters()))
    errors = []
    for model in models:
        model.to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(ids.to(device), targets.to(device))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        errors.append([(a.cpu().double() - b).norm() / b.norm().clamp_min(1e-12) for a, b in zip(gradients, wanted)])
    fused, single = (torch.stack(e).mean() for e in errors)
    assert 0 < fused < 2 * single < 0.1


def test_autocast_rounds_the_weights_of_the_gates_once():
    """For both passes: the backward pass has what the forward pass rounded."""
    model = libxlstm.make_model({"model": {"vocab_size": 300, "embedding_dim": 32, "num_blocks": 1, "num_heads": 2}})
    with torch.profiler.profile(record_shapes=True) as profile:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(random_ids(2, 11))[0].float().sum()
        loss.backward()
    rows = [4, 3 * 64]  # of two gates of two heads, for q, k and v
    casts = [event for event in profile.events() if event.name == "aten::_to_copy" and event.input_shapes[0] == rows]
    assert len(casts) == 1


@needs_gpu
def test_to_and_load_take_a_gpu(tmp_path):
    model = make_model()
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = model(ids)[0]
        model.save(tmp_path / "model")
        for moved in (model.to("cuda"), libxlstm.load(tmp_path / "model", device="cuda")):
            assert {p.device.type for p in moved.parameters()} == {"cuda"}
            torch.testing.assert_close(moved(ids.cuda())[0].cpu(), expected, rtol=1e-3, atol=1e-4)
            drawn = moved.generate([5, 290], 30, seed=3)
            assert len(drawn) == 30 and drawn == moved.generate([5, 290], 30, seed=3)


def test_loss_as_documented():
    model = make_model()
    tokens = random_ids(3, 9)
    ids, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :3] = -100
    with torch.no_grad():
        logits = model(ids)[0]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 8)
        each = model.loss(ids, targets, reduction="none")
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)
        assert each[0, :3].abs().max() == 0
        torch.testing.assert_close(model.loss(ids, targets, reduction="sum"), each.sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.loss(ids, targets), each.sum() / 21, rtol=1e-4, atol=1e-5)
        assert model.loss(ids, torch.full_like(targets, -100)) == 0


def test_loss_goes_on_from_a_state():
    model = make_model()
    tokens = random_ids(2, 13)
    whole = model.loss(tokens[:, :-1], tokens[:, 1:], reduction="sum")
    model.zero_grad()
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]

    def pieces(cut):
        model.zero_grad()
        losses, state = [], None
        for first in (0, 5):
            ids, targets = (tokens[:, first + s:first + s + (5, 7)[first > 0]] for s in (0, 1))
            loss, state = model(ids, state, targets=targets, reduction="sum")
            losses.append(loss)
            if cut:
                loss.backward()
                state = [[tensor.detach() for tensor in block] for block in state]
        if not cut:
            sum(losses).backward()
        torch.testing.assert_close(sum(losses), whole, rtol=1e-5, atol=1e-4)
        return [p.grad for p in model.parameters()]

    for found, wanted in zip(pieces(cut=False), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert max((found - wanted).abs().max() for found, wanted in zip(pieces(cut=True), expected)) > 0.01
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 0] = True
    _, state = model(tokens[:, :12])
    anew, _ = model(tokens[:, :-1], state, reset, targets=tokens[:, 1:], reduction="sum")
    torch.testing.assert_close(anew, whole, rtol=1e-5, atol=1e-4)


def test_mode():
    model = make_model()
    assert model.training
    assert model.eval() is model and not model.training
    assert model.train() is model and model.training
    assert not model.train(False).training


def test_it_is_a_module(tmp_path):
    """state_dict, freezing, hooks, zero_grad, named parts: as torch.nn.Module has them."""
    model, other = make_model(1), make_model(2)
    ids = random_ids(2, 7)
    assert isinstance(model, torch.nn.Module)
    assert {"", "embedding", "blocks", "blocks.1.slstm"} <= {name for name, _ in model.named_modules()}
    state = model.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()] and not any(t.requires_grad for t in state.values())
    torch.save(state, tmp_path / "weights.pt")
    with torch.no_grad():
        expected = model(ids)[0]
        assert not torch.equal(other(ids)[0], expected)
        assert str(other.load_state_dict(torch.load(tmp_path / "weights.pt"))) == "<All keys matched successfully>"
        assert torch.equal(other(ids)[0], expected)
    with pytest.raises(RuntimeError, match="blocks.0.mlstm.skip"):
        other.load_state_dict({k: v for k, v in state.items() if k != "blocks.0.mlstm.skip"})
    with pytest.raises(ValueError, match="assign=True"):
        other.load_state_dict(state, assign=True)

    model.blocks.requires_grad_(False)
    seen = []
    handle = model.register_forward_hook(lambda module, given, result: seen.append(result[0].shape))
    model(ids)[0].sum().backward()
    handle.remove()
    assert seen == [(2, 7, 300)]
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"embedding", "out_norm", "lm_head"}
    model.zero_grad()
    assert not any(p.grad is not None for p in model.parameters())


def test_settings_as_a_dictionary(tmp_path):
    torch.manual_seed(1)
    model = libxlstm.make_model(yaml.safe_load(YAML))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model().parameters(), strict=True))
    with pytest.raises(libxlstm.Error, match="embeding_dim.*embedding_dim"):
        libxlstm.make_model({"model": {"embeding_dim": 32}})
    stack = libxlstm.BlockStack(embedding_dim=np.int64(32), num_blocks=torch.tensor(2), num_heads=2, slstm_at=range(2))
    assert "blocks.1.slstm" in dict(stack.named_modules()) and stack(torch.ones(1, 3, 32))[0].shape == (1, 3, 32)
    with pytest.raises(TypeError, match="settings: expected numbers, texts, lists and dictionaries, got <object"):
        libxlstm.BlockStack(embedding_dim=object())
    make_model().save(tmp_path / "model")
    for make in (lambda **settings: libxlstm.make_model({"model": settings}), libxlstm.BlockStack,
                 lambda **settings: libxlstm.load(tmp_path / "model", settings={"model": {"lora": settings["lora"]}})):
        with pytest.raises(libxlstm.Error, match="lora.rank: expected 0, got 2") as caught:
            make(embedding_dim=32, num_blocks=1, num_heads=2, lora={"rank": 2})
        assert caught.value.code == 2


@pytest.mark.parametrize("name", ["caf\u00e9", "\U0001f600 model", "a\x7f\x85b", "\u2028\ufeff", "\"\\", "line\nbreak\ttab"])
def test_settings_of_any_characters(name, tmp_path):
    model = libxlstm.make_model({"model": yaml.safe_load(YAML)["model"], "run": {"name": "a", "out_dir": f"runs/{name}"}})
    assert yaml.safe_load(model.settings)["run"]["out_dir"] == f"runs/{name}"
    model.save(tmp_path / "model")
    again = libxlstm.load(tmp_path / "model", settings={"run": {"out_dir": f"again/{name}"}})
    assert yaml.safe_load(again.settings)["run"]["out_dir"] == f"again/{name}"
    with pytest.raises(libxlstm.Error, match="kind"):
        libxlstm.BlockStack(kind=name)


DATA_PARALLEL = """
import sys, torch, libxlstm
store, yaml, rank, out = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
torch.manual_seed(int(rank))  # the processes begin with other weights
model = libxlstm.make_model(yaml)
parallel = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
for step in range(3):
    ids = torch.randint(300, (4, 9), generator=torch.Generator().manual_seed(step))[int(rank)::2]
    loss, _ = parallel(ids, targets=ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save(model.state_dict(), out)
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel_averages_over_processes(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    outs = [tmp_path / "0.pt", tmp_path / "1.pt"]
    running = [subprocess.Popen([sys.executable, "-c", DATA_PARALLEL, tmp_path / "store", YAML, str(rank), out], env=environment)
               for rank, out in enumerate(outs)]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    both = [torch.load(out) for out in outs]
    model = make_model(seed=0)  # what process 0 began with
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        ids = torch.randint(300, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    for name, alone in model.state_dict().items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], alone, rtol=1e-4, atol=1e-5)


def test_compile_leaves_a_call_as_it_is():
    model = make_model()
    ids = random_ids(2, 9)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(ids)[0], model(ids)[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="write a torch.nn.Module of torch.ops.xlstm"):
        torch.compile(model, backend="eager", fullgraph=True)(ids)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="write a torch.nn.Module of torch.ops.xlstm"):
        torch.export.export(model, (ids,), strict=True)


def test_parts_by_number():
    model = make_model()
    assert len(model.blocks) == 3 and model.blocks[-1] is model.blocks[2]
    assert model.blocks[0:2] == list(model.blocks)[:2] == [model.blocks[0], model.blocks[1]]
    with pytest.raises(IndexError):
        model.blocks[3]
    for part, x in ((model.blocks[0], torch.ones(1, 2, 32)), (model.lm_head, torch.ones(32))):
        with pytest.raises(NotImplementedError, match="holds parameters and computes nothing by itself: call the module"):
            part(x)


def test_a_folder_of_transformers_is_pointed_to_the_converter(tmp_path):
    with pytest.raises(libxlstm.Error, match="MANIFEST.json") as caught:
        libxlstm.load(tmp_path)
    assert "libxlstm.convert" not in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(libxlstm.Error, match="libxlstm.convert --from hf") as caught:
        libxlstm.load(tmp_path)
    assert caught.value.code == 4 and "MANIFEST.json" in str(caught.value)


def test_errors_are_python_exceptions():
    model = make_model()
    with pytest.raises(RuntimeError, match=r"ids: expected \(B,T\) int64"):
        model(torch.zeros(2, 3))
    with pytest.raises(IndexError, match="out of range"):
        model(torch.full((1, 2), 300))
    with pytest.raises(libxlstm.Error, match="<string>:2.*colour") as caught:
        libxlstm.make_model("model:\n  colour: 3\n")
    assert caught.value.code == 2
    with pytest.raises(libxlstm.Error, match="does-not-exist"):
        libxlstm.load("does-not-exist")


def test_threads_may_call_one_model():
    """Several threads at once give what one gives."""
    model = make_model()
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = model(ids)[0]
    results = [None] * 4

    def work(index):
        with torch.no_grad():
            results[index] = model(ids)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(result, expected) for result in results)


def test_schema_is_json():
    import json

    assert "model" in json.dumps(json.loads(C.config_schema_json()))


def test_parameters_are_parameters_and_copies_stay_together():
    model = make_model()
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert model.get_parameter("blocks.0.norm.weight") is model.blocks.get_submodule("0").norm.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    twin, other, embedding = copy.deepcopy((model, optimizer, model.embedding))
    assert embedding is twin.embedding
    ids = random_ids(1, 5)
    twin.loss(ids, ids).backward()
    before = twin(ids)[0]
    other.step()
    assert not torch.equal(twin(ids)[0], before) and len(seen) == 2
    assert torch.equal(model(ids)[0], before)


def test_losses_check_their_targets():
    model = make_model()
    ids = random_ids(2, 5)
    for fused in ("true", "false"):
        model = libxlstm.make_model(YAML + f"  fused: {fused}\n")
        for targets in (ids.T.contiguous(), ids[:1], ids.flatten()):
            with pytest.raises(RuntimeError, match="target"):
                model.loss(ids, targets)
        with pytest.raises(RuntimeError, match='reduction: expected "mean"'):
            model.loss(ids, ids, reduction="foo")
    numbers = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "vocab_size": 1,
                                             "input_features": 3}})
    x, targets = torch.randn(2, 5, 3), torch.randn(2, 5)
    for wrong in (targets[..., None], targets[0], targets.T):
        with pytest.raises(RuntimeError, match=r"loss: targets: expected \(B,T\)"):
            numbers.loss(x, wrong)
    with pytest.raises(RuntimeError, match='reduction: expected "mean"'):
        numbers.loss(x, targets, reduction="foo")
    targets[:, 3:] = float("nan")
    loss = numbers.loss(x, targets)
    torch.testing.assert_close(loss, numbers.loss(x[:, :3], targets[:, :3]))
