"""Models and stacks as pickles: copies on this machine and others, torch.save, processes."""

import copy
import copyreg
import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_accelerate import accelerated, make_large, stand_ins
from test_accelerate import random_ids as random_tokens
from test_block_stack import Regression
from test_models import make_model, random_ids
from test_scoring import make_yaml, train_tokenizer

import libxlstm

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies(tmp_path):
    model = make_model().to(torch.float64).eval()
    model.lm_head.requires_grad_(False)
    ids = random_ids(2, 7)
    state = torch.get_rng_state()
    other = copy.deepcopy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not other.training and other.settings == model.settings and other(ids)[0].dtype == torch.float64
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.requires_grad == b.requires_grad, name
    before = model(ids)[0]
    with torch.no_grad():
        other.embedding.weight.zero_()
    assert torch.equal(model(ids)[0], before) and not torch.equal(other(ids)[0], before)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average(ids)[0], before)

    model.save(tmp_path / "model")
    loaded = libxlstm.load(tmp_path / "model")
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_copy_drops_what_the_model_does():
    model = libxlstm.make_model({"model": {"embedding_dim": 16, "num_blocks": 1, "num_heads": 2, "dropout": 0.5}})
    ids = random_ids(2, 9) % 256
    for training in (True, False):
        other = copy.deepcopy(model.train(training))
        assert torch.equal(other(ids)[0], other(ids)[0]) is not training


@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy])
def test_adapters_and_weights_of_8_bits(copied):
    torch.manual_seed(1)
    stack = libxlstm.BlockStack(embedding_dim=64, num_blocks=2, num_heads=2, lora={"rank": 2}).quantize().eval()
    twin, x = copied(stack), torch.randn(2, 5, 64).bfloat16()
    for (name, ours), theirs in zip(stack.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        assert ours.requires_grad == theirs.requires_grad == name.endswith(("lora_a", "lora_b"))
    assert torch.equal(stack(x)[0], twin(x)[0])


@pytest.mark.parametrize("copied", [pickled, saved])
@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_adapters_beside_rounded_weights(copied, base):
    torch.manual_seed(1)
    stack = libxlstm.BlockStack(embedding_dim=64, num_blocks=2, num_heads=2, lora={"rank": 2, "base": base}).eval()
    twin, x = copied(stack), torch.randn(2, 5, 64)
    for (name, ours), theirs in zip(stack.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    assert torch.equal(stack(x)[0], twin(x)[0])


class Scaled(libxlstm.BlockStack):
    """What users make of a stack. Here, because a pickle names its class."""

    def __init__(self):
        super().__init__(embedding_dim=32, num_blocks=2, num_heads=2)
        self.norm = torch.nn.BatchNorm1d(32)
        self.gain = torch.nn.Parameter(torch.tensor(3.0))
        self.label = "mine"
        self.itself = [self]
        self.register_forward_hook(double)

    def forward(self, x):
        return self.gain * self.norm(super().forward(x)[0].transpose(1, 2))


class Locked(Scaled):
    """Has something that no pickle takes."""

    def __init__(self):
        super().__init__()
        self.stream = open(__file__)  # noqa: SIM115

    def __getstate__(self):
        state = super().__getstate__()
        del state["stream"]
        return state


def double(module, inputs, output):
    return 2 * output


def assert_same(a, b):
    assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
    for (name, x), (_, y) in zip(a.state_dict(keep_vars=True).items(), b.state_dict(keep_vars=True).items(), strict=True):
        assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y), name
        assert x.requires_grad == y.requires_grad and x.data_ptr() != y.data_ptr(), name
    for (name, x), (_, y) in zip(a.named_modules(), b.named_modules(), strict=True):
        assert type(x) is type(y) and x.training == y.training, name


@pytest.mark.parametrize("copying", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_the_same_model(copying, device):
    model = make_model().to(device, torch.bfloat16).eval()
    model.lm_head.requires_grad_(False)
    model.blocks[2].train()
    ids = random_ids(2, 7).to(device)
    before, random = model(ids)[0], torch.get_rng_state()
    other = copying(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert other.settings == model.settings and other.folder == model.folder
    assert_same(model, other)
    assert all(isinstance(p, torch.nn.Parameter) for p in other.parameters())
    assert torch.equal(other(ids)[0], before)
    with torch.no_grad():
        other.embedding.weight.zero_()
    assert torch.equal(model(ids)[0], before) and not torch.equal(other(ids)[0], before)


KINDS = ("xlstm_large", "lstm", "gpt", "mamba", "rwkv4", "rwkv6", "retnet", "hgrn2", "h3", "hyena")


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_stacks_of_every_kind(kind):
    settings = {"kind": kind, "embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "norm_eps": 1.1e-7, "dropout": 0.1}
    random, model = torch.get_rng_state(), libxlstm.make_model({"model": {**settings, "vocab_size": 90}})
    stack, drawn = libxlstm.BlockStack(**settings), torch.get_rng_state()
    x, ids = torch.randn(1, 5, 32), torch.randint(90, (1, 5))
    torch.set_rng_state(drawn)
    others = pickled((model, stack))
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(random, drawn)
    assert_same(model, others[0])
    assert_same(stack, others[1])
    assert torch.equal(others[0].eval()(ids)[0], model.eval()(ids)[0])
    assert torch.equal(others[1].eval()(x)[0], stack.eval()(x)[0])
    assert others[0].settings == model.settings and repr(others[1]) == repr(stack)


def test_dropout_goes_along():
    model = libxlstm.make_model({"model": {"embedding_dim": 16, "num_blocks": 1, "num_heads": 2, "dropout": 0.5}})
    ids = random_ids(2, 9) % 256
    for training in (True, False):
        other = pickled(model.train(training))
        assert torch.equal(other(ids)[0], other(ids)[0]) is not training


def test_tied_weights_stay_one():
    model = libxlstm.make_model({"model": {"embedding_dim": 16, "num_blocks": 1, "num_heads": 2, "tie_weights": True}})
    ids = torch.randint(256, (1, 5))
    other = pickled(model)
    assert_same(model, other)
    before = other.logits(torch.ones(16))
    with torch.no_grad():
        other.embedding.weight.mul_(2)
    torch.testing.assert_close(other.logits(torch.ones(16)), 2 * before)
    both = pickled([model, {"again": model}])
    assert both[0] is both[1]["again"]
    other.loss(ids, ids).backward()
    assert all(p.grad is not None for p in other.parameters()) and model.embedding.weight.grad is None


class Tied(torch.nn.Module):
    """A head of one's own that shares the embedding, before or behind the model."""

    def __init__(self, head_first):
        super().__init__()
        model, head = make_model(), torch.nn.Linear(32, 300, bias=False)
        head.weight = model.embedding.weight
        parts = {"head": head, "model": model, "table": model.embedding}
        for name in sorted(parts, reverse=not head_first):
            self.add_module(name, parts[name])


@pytest.mark.parametrize("copying", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize("head_first", [True, False])
def test_what_shares_parameters_shares_those_of_the_copy(copying, head_first):
    net, ids = Tied(head_first), random_ids(2, 9)
    net.model.loss(ids, ids).backward()
    other = copying(net)
    weight = other.model.embedding.weight
    assert other.head.weight is weight and other.table.weight is weight
    assert all(isinstance(p, torch.nn.Parameter) and p.grad is None for p in other.parameters())
    assert len(list(other.parameters())) == len(list(net.parameters()))
    other.model.loss(ids, ids).backward()
    torch.testing.assert_close(other.head.weight.grad, net.head.weight.grad)
    with torch.no_grad():
        other.head.weight.fill_(2)
    assert (other.model.embed(ids) == 2).all() and not (net.head.weight == 2).any()


@pytest.mark.parametrize("copying", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize("model_first", [True, False])
def test_an_optimizer_goes_on_with_the_copy(copying, model_first):
    model, ids = make_model(), random_ids(2, 9)
    optimizer = torch.optim.AdamW(model.param_groups(), lr=1e-2)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        return loss.item()

    step(model, optimizer)
    both = copying((model, optimizer) if model_first else (optimizer, model))
    other = both if model_first else both[::-1]
    assert [step(model, optimizer) for _ in range(3)] == [step(*other) for _ in range(3)]


@pytest.mark.parametrize("copying", [pickled, copy.deepcopy])
def test_shallow_copies_stay_one_module(copying):
    model = make_model()
    one, other = copying([model, copy.copy(model)])
    assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        one.embedding.weight.zero_()
    assert (other.embed(random_ids(1, 5)) == 0).all()


@pytest.mark.parametrize("copying", [pickled, saved, copy.deepcopy])
def test_what_a_subclass_has_goes_along(copying):
    stack = Scaled()
    x = torch.randn(2, 7, 32)
    stack(x)
    other = copying(stack)
    assert_same(stack, other)
    assert other.label == "mine" and other.itself[0] is other
    assert torch.equal(stack.eval()(x), other.eval()(x))
    other.double()
    assert all(p.dtype == torch.double for p in other.parameters()) and stack.gain.dtype == torch.float32


@pytest.mark.parametrize("copying", [pickled, saved])
def test_a_network_around_a_stack(copying):
    net, x = Regression(), torch.randn(4, 9, 5)
    net.stack.blocks[0].requires_grad_(False)
    other = copying(net)
    assert_same(net, other)
    assert torch.equal(other(x)[0], net(x)[0])
    other(x)[0].sum().backward()
    assert other.lift.weight.grad is not None and net.lift.weight.grad is None


def test_a_subclass_may_leave_things_out():
    stack = Locked()
    with stack.stream:
        for copying in (pickled, copy.deepcopy):
            other = copying(stack)
            assert_same(stack, other)
            assert not hasattr(other, "stream")


def test_a_copy_trains():
    model = make_model()
    other, ids = pickled(model), random_ids(2, 9)
    losses = []
    for one in (model, other):
        optimizer = torch.optim.AdamW(one.param_groups(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = one.loss(ids, ids)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1] < model.eval().loss(ids.flip(1), ids).item()


def test_a_shallow_copy_shares_all_of_it():
    model = make_model()
    other, ids = copy.copy(model), random_ids(1, 5)
    assert type(other) is libxlstm.Model and other is not model and other.blocks is model.blocks
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert torch.equal(other(ids)[0], model(ids)[0])
    other.note = "of the copy"
    assert not hasattr(model, "note")
    stack = copy.copy(Scaled())
    assert stack(torch.randn(2, 7, 32)).shape == (2, 32, 7)


def test_a_replaced_parameter_is_not_pickled():
    model = make_model()
    model.out_norm._parameters["weight"] = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(RuntimeError, match="out_norm.weight: a parameter was replaced"):
        pickle.dumps(model)


def test_parameters_of_another_version_are_an_error():
    core = make_model()._core
    make, (*settings, tensors) = copyreg.dispatch_table[type(core)](core)
    tensors.pop("out_norm.weight")
    with pytest.raises(RuntimeError, match="another version of libxlstm"):
        make(*settings, tensors)


def test_bytes_go_along(tmp_path):
    make_model().save(tmp_path / "model")
    model = libxlstm.load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert pickled(model).tokenizer.encode("ab") == [97, 98]
    assert pickled(make_model()).tokenizer is None
    pickled(model).save(tmp_path / "again")
    assert_same(libxlstm.load(tmp_path / "again"), model)


def test_a_tokenizer_goes_along(tmp_path):
    """The copy may be read where the files are not."""
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("a template")
    libxlstm.make_model(make_yaml(vocab=280, tokenizer=tmp_path / "tokenizer.json")).save(tmp_path / "model")
    model = libxlstm.load(tmp_path / "model")
    copied, ids = pickle.dumps(model), model.tokenizer.encode("the cell keeps")
    unread = libxlstm.load(tmp_path / "model")
    for name in ("tokenizer.json", "model"):
        (shutil.rmtree if name == "model" else Path.unlink)(tmp_path / name)
    other = pickle.loads(copied)
    assert other.tokenizer.encode("the cell keeps") == ids and other.tokenizer.eos_id == model.tokenizer.eos_id
    assert other.generate(ids, 5, temperature=0) == model.generate(ids, 5, temperature=0)
    other.save(tmp_path / "again")
    assert libxlstm.load(tmp_path / "again").tokenizer.encode("the cell keeps") == ids
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "a template"
    lost = pickled(unread)  # its files were gone before it was pickled
    assert_same(lost, unread)
    with pytest.raises(ValueError, match="no tokenizer there"):
        _ = lost.tokenizer


SPAWN = """
import sys, torch, libxlstm

def work(rank, model, stack, ids, results):
    with torch.no_grad():
        trained = [p.requires_grad for p in stack.parameters()]
        results.put([rank, model(ids)[0].tolist(), model.tokenizer is None, stack.training, trained])
        if rank == 1:
            model.out_norm.weight.fill_(7)

if __name__ == "__main__":
    torch.manual_seed(1)
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2}})
    stack = libxlstm.BlockStack(embedding_dim=32, num_blocks=1, num_heads=2).eval()
    stack.out_norm.requires_grad_(False)
    trained = [p.requires_grad for p in stack.parameters()]
    ids = torch.randint(256, (1, 5))
    with torch.no_grad():
        expected = model(ids)[0].tolist()
    spawn = torch.multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    for rank in range(2):
        process = spawn.Process(target=work, args=(rank, model, stack, ids, results))
        process.start()
        assert results.get() == [rank, expected, True, False, trained]
        process.join()
        assert process.exitcode == 0
    assert (model.out_norm.weight == 7).all()  # memory is shared, as that of other modules
"""


def test_spawned_processes_take_a_model(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    subprocess.run([sys.executable, script], check=True, timeout=500, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("copied", [pickled, saved])
def test_accelerated_models_of_other_packages(copied):
    ours = accelerated(make_large())
    twin, ids = copied(ours), random_tokens(2, 7)
    assert stand_ins(twin) == stand_ins(ours)
    with torch.no_grad():
        assert torch.equal(twin(ids)[0], ours(ids)[0])
    assert not stand_ins(libxlstm.accelerate(twin, enabled=False))
