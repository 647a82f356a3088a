"""What may be done with a model beside calling it: its parts, its hidden vectors, arguments as they come, other settings."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from test_models import make_model, random_ids

import libxlstm


def test_a_replaced_parameter_is_an_error():
    """The C++ model would compute with the old one in silence."""
    model = make_model()
    ids = random_ids(1, 5)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="was replaced"):
        torch.func.functional_call(model, zeros, (ids,))
    model(ids)
    model.out_norm._parameters["weight"] = torch.nn.Parameter(torch.ones(32))
    for use in (lambda: model(ids), lambda: model.loss(ids, ids), lambda: model.save("nowhere"), lambda: model.hidden(ids)):
        with pytest.raises(RuntimeError, match="out_norm.weight: a parameter was replaced"):
            use()
    model = make_model()
    model.blocks[1]._modules["slstm"] = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="slstm: a part was replaced"):
        model(ids)


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "lm_head", torch.nn.Linear(32, 10)), lambda m: setattr(m, "lm_head", torch.nn.Identity()),
    lambda m: m.set_submodule("blocks.0.mlstm", torch.nn.Identity()), lambda m: delattr(m, "blocks"),
    lambda m: setattr(m.blocks[0].mlstm, "proj_up", torch.nn.Linear(32, 64)), lambda m: delattr(m.out_norm, "weight"),
    lambda m: setattr(m.out_norm, "weight", torch.nn.Parameter(torch.ones(32))),
    lambda m: setattr(m.blocks[0], "forward", lambda x: x), lambda m: m.blocks[0].add_module("lora", torch.nn.Linear(2, 2)),
    lambda m: m.lm_head.register_parameter("bias", torch.nn.Parameter(torch.ones(300))),
    lambda m: m.blocks[0].register_forward_hook(print), lambda m: m.out_norm.register_full_backward_hook(print),
])
def test_parts_cannot_be_changed_in_silence(change):
    model = make_model()
    ids = random_ids(1, 5)
    before = model(ids)[0]
    with pytest.raises(AttributeError, match=r"Model.hidden.*ModelSummary\(max_depth=1\)"):
        change(model)
    assert torch.equal(model(ids)[0], before)


def test_an_attempt_to_export_leaves_the_model_as_it_was():
    model = make_model().eval()
    ids = random_ids(1, 5)
    with torch.no_grad():
        before = model(ids)[0]
        with pytest.raises(Exception):  # noqa: B017  whichever: the model itself is not traced
            torch.export.export(model, (ids,))
        assert torch.equal(model(ids)[0], before)


def test_hidden_vectors_and_embeddings():
    model = make_model()
    ids, lengths = random_ids(2, 7), [7, 4]
    y, state = model.hidden(ids)
    assert y.shape == (2, 7, 32)
    torch.testing.assert_close(model.logits(y), model(ids)[0])
    embeddings = model.embed(ids)
    assert torch.equal(model.hidden(embeddings=embeddings)[0], y)
    more = random_ids(2, 3)
    torch.testing.assert_close(model.hidden(embeddings=model.embed(more), state=state)[0], model.hidden(more, state)[0])
    torch.testing.assert_close(model.hidden(embeddings=embeddings, lengths=lengths)[0], model.hidden(ids, lengths=lengths)[0])
    prompt = torch.randn(1, 4, 32, requires_grad=True)  # that is learned
    learned = torch.cat([prompt.expand(2, -1, -1), embeddings], 1)
    model.hidden(embeddings=learned)[0][:, -1].sum().backward()
    assert prompt.grad.abs().min() > 0
    head = torch.nn.Linear(32, 10)  # of one's own
    torch.nn.functional.cross_entropy(head(y[:, -1]), torch.tensor([3, 4])).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" not in name)
    for wrong, message in (({}, "either ids or embeddings"), ({"ids": ids, "embeddings": embeddings}, "either ids or")):
        with pytest.raises(TypeError, match=message):
            model.hidden(**wrong)
    with pytest.raises(RuntimeError, match=r"embeddings: expected \(B,T,32\) floating"):
        model.hidden(embeddings=embeddings[..., :31])
    gpt = libxlstm.make_model({"model": {"kind": "gpt", "embedding_dim": 32, "num_blocks": 2, "num_heads": 2}})
    ids = torch.randint(256, (2, 7))
    assert torch.equal(gpt.hidden(embeddings=gpt.embed(ids))[0], gpt.hidden(ids)[0])  # positions are added behind


STACKS = [{}, {"kind": "xlstm_large", "slstm_at": []}, {"kind": "gpt", "slstm_at": []}, {"kind": "hgrn", "slstm_at": []},
          {"kind": "lstm", "slstm_at": []}, {"mlstm": {"up_projection": "post"}}, {"fused": False}, {"add_out_norm": False},
          {"activation_checkpointing": True}]


@pytest.mark.parametrize("settings", STACKS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_vectors_behind_blocks(settings, autocast):
    """Those behind block i are what a stack of the first i + 1 blocks without a norm gives."""
    sizes = {"embedding_dim": 32, "num_heads": 2, **settings}
    torch.manual_seed(1)
    stack = libxlstm.BlockStack(**{"num_blocks": 4, "slstm_at": [1], **sizes})
    x, more, reset = torch.randn(2, 21, 32), torch.randn(2, 3, 32), torch.rand(2, 21) < 0.1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = stack(x, reset=reset)
        again, same_state, vectors = stack(x, reset=reset, blocks=[0, -1, 2, 0])
        torch.testing.assert_close(again, y)
        for a, b in zip(state, same_state, strict=True):
            torch.testing.assert_close(a, b)
        assert len(vectors) == 4 and torch.equal(vectors[0], vectors[3])
        for vector, count in zip(vectors, (1, 4, 3), strict=False):
            if settings.get("kind") == "hgrn" and count < 4:
                continue  # lower bounds depend on the number of blocks
            slstm_at = [1] if "kind" not in sizes and count > 1 else []
            first = libxlstm.BlockStack(**{**sizes, "num_blocks": count, "slstm_at": slstm_at, "add_out_norm": False})
            first.load_state_dict({name: stack.state_dict()[name] for name in first.state_dict()})
            expected, its_state = first(x, reset=reset)
            torch.testing.assert_close(vector, expected)
            rest, _, (later,) = stack(more, state, blocks=[count - 1])
            torch.testing.assert_close(later, first(more, its_state)[0])
            torch.testing.assert_close(rest, stack(more, state)[0])
        assert stack(x, blocks=[])[2] == [] and len(stack(x)) == 2
        if settings.get("add_out_norm") is False:
            assert torch.equal(vectors[1], again)
            with torch.no_grad():  # each may be changed
                kept = again.clone()
                vectors[1].zero_()
                assert torch.equal(again, kept)


def test_vectors_behind_blocks_of_a_model():
    model = make_model()
    ids, lengths = random_ids(2, 7), [7, 4]
    y, state, (first, last) = model.hidden(ids, blocks=[0, -1])
    assert torch.equal(y, model.hidden(ids)[0])
    norm = model.out_norm.weight
    torch.testing.assert_close(torch.nn.functional.layer_norm(last, (32,), norm), y)
    more = random_ids(2, 1)
    with torch.no_grad():  # decoding steps
        _, after, (next_first,) = model.hidden(more, state, blocks=[-3])
        whole = model.hidden(torch.cat([ids, more], 1), blocks=[0])[2][0]
        torch.testing.assert_close(torch.cat([first, next_first], 1), whole)
        torch.testing.assert_close(model(more, after)[0], model(more, model.hidden(more, state)[1])[0])
    padded = model.hidden(ids, lengths=lengths, blocks=(0,))[2][0]
    torch.testing.assert_close(padded[1, :4], model.hidden(ids[1:, :4], blocks=[0])[2][0][0])
    assert torch.equal(padded[0], first[0]) and not padded[1, 4:].any()
    embedded = model.hidden(embeddings=model.embed(ids), blocks=[0])[2][0]
    assert torch.equal(embedded, first)
    x = torch.randn(2, 7, 32)
    stack = libxlstm.BlockStack(embedding_dim=32, num_blocks=2, num_heads=2)
    padded = stack(x, lengths=lengths, blocks=[-2])[2][0]
    torch.testing.assert_close(padded[1, :4], stack(x[1:, :4], blocks=[0])[2][0][0])
    assert not padded[1, 4:].any()


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_of_vectors_behind_blocks(recomputed):
    torch.manual_seed(2)
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 3, "num_heads": 2, "slstm_at": [1],
                                           "activation_checkpointing": recomputed}}).double()
    ids = torch.randint(256, (2, 5))
    model.hidden(ids, blocks=[1])[2][0].square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"0", "1"}
    assert "out_norm.weight" not in trained and "embedding.weight" in trained

    def loss(embeddings):
        y, _, (first, second) = model.hidden(embeddings=embeddings, blocks=[0, 1])
        return (y * y).sum() + (first * first * first).sum() + (second * second).sum()

    assert torch.autograd.gradcheck(loss, torch.randn(1, 3, 32, dtype=torch.double, requires_grad=True), fast_mode=True)


def test_blocks_that_are_not_there():
    model, ids = make_model(), random_ids(1, 5)
    for blocks in ([3], [0, -4]):
        with pytest.raises(IndexError, match=f"blocks: expected positions from -3 to 2, got {blocks[-1]}"):
            model.hidden(ids, blocks=blocks)
    for blocks in (["0"], [0.5], 1):
        with pytest.raises(TypeError):
            model.hidden(ids, blocks=blocks)
    with pytest.raises(IndexError, match="blocks: expected positions from 0 to 2, got -1"):
        model._core.hidden(False, ids, None, None, None, [-1])


def test_arguments_as_they_come():
    model = make_model()
    ids = random_ids(2, 7)
    expected = model(ids)[0]
    for given in (ids.tolist(), ids.numpy(), ids.int(), ids.short()):
        assert torch.equal(model(given)[0], expected)
        assert torch.equal(model.embed(given), model.embed(ids))
    y = model.hidden(ids)[0].detach()
    assert torch.equal(model.logits(y.numpy()), model.logits(y))
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 3] = True
    assert torch.equal(model(ids, reset=reset.long())[0], model(ids, reset=reset)[0])
    for state in ([None] * 3, 5, [[1.0]], [torch.zeros(3)], torch.zeros(3, 2)):
        with pytest.raises(TypeError, match="state: expected None or what a call returned"):
            model(ids, state)
    with pytest.raises(ValueError, match="model.tokenizer.encode"):
        model.generate("text")
    with pytest.raises(TypeError, match=r"x: expected torch.float32.*got torch.float64"):
        libxlstm.BlockStack(embedding_dim=32, num_blocks=1)(torch.ones(1, 2, 32, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"embeddings: expected torch.float32.*got torch.float64"):
        model.hidden(embeddings=y.double())
    with pytest.raises(TypeError, match=r"hidden: expected torch.float32.*got torch.bfloat16"):
        model.logits(y.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(embeddings=y.bfloat16()), model.logits(y.bfloat16())
    for call in (model, model.embed, lambda ids: model.loss(ids, ids), lambda ids: model.hidden(ids.tolist())):
        for outside in (300, -1):
            with pytest.raises(IndexError, match=f"ids: expected ids from 0 to 299, got {outside}"):
                call(torch.tensor([[1, outside, 2]]))


def test_parameter_groups():
    model = make_model()
    model.blocks[0].requires_grad_(False)
    decaying, others = model.param_groups(weight_decay=0.3)
    assert decaying["weight_decay"] == 0.3 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, others = ({names[id(p)] for p in group["params"]} for group in (decaying, others))
    assert decaying | others == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"lm_head.weight", "blocks.2.mlstm.proj_up.weight"} <= decaying
    assert {"embedding.weight", "out_norm.weight", "blocks.2.mlstm.skip"} <= others
    of_embedding = {names[id(p)] for p in model.param_groups(of_embedding=True)[0]["params"]}
    assert of_embedding == decaying | {"embedding.weight"}
    torch.optim.AdamW(model.param_groups())


def test_a_checkpoint_with_other_settings(tmp_path, capfd):
    make_model().save(tmp_path / "model")
    dropping = libxlstm.load(tmp_path / "model", settings={"model": {"dropout": 0.5, "activation_checkpointing": True}}).train()
    ids = random_ids(2, 7)
    assert not torch.equal(dropping(ids)[0], dropping(ids)[0]) and "dropout: 0.5" in dropping.settings
    assert torch.equal(dropping.eval()(ids)[0], libxlstm.load(tmp_path / "model")(ids)[0])
    assert capfd.readouterr().err == ""
    libxlstm.load(tmp_path / "model", settings={"model": {"norm_eps": 0.5}})
    assert "trained with model.norm_eps=1.0e-05 (here 0.5); the tensors fit, but the model computes" in capfd.readouterr().err
    for settings, message in (({"model": {"num_blocks": 4}}, "does not fit"), ({"model": {"dropou": 0.5}}, "dropou.*dropout"),
                              ({"model": {"dropout": 2}}, "model.dropout")):
        with pytest.raises(libxlstm.Error, match=message):
            libxlstm.load(tmp_path / "model", settings=settings)


def test_a_lack_of_memory_is_no_wrong_setting():
    program = """
import resource, libxlstm
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (own + 2**28, -1))
try:
    libxlstm.make_model({"model": {"num_blocks": 2, "embedding_dim": 8192}})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("RuntimeError") and "allocate memory" in done.stdout, done.stderr


def test_a_model_that_is_dropped_is_freed_at_once():
    """Without a collection, which does not come: few objects of Python's are made."""
    gc.disable()
    try:
        for make in (make_model, lambda: copy.deepcopy(make_model()),
                     lambda: libxlstm.BlockStack(embedding_dim=16, num_blocks=1, num_heads=2)):
            model = make()
            with torch.no_grad():
                model(random_ids(1, 3) if isinstance(model, libxlstm.Model) else torch.randn(1, 3, 16))
            alive = weakref.ref(model)
            del model
            assert alive() is None
    finally:
        gc.enable()


def test_settings_as_they_come(tmp_path):
    """By name, as a dictionary, as text, of a file with what it builds on."""
    settings = {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2}
    (tmp_path / "base.yaml").write_text("model: {embedding_dim: 32, num_blocks: 2, num_heads: 4}\n")
    (tmp_path / "my.yaml").write_text("base: base.yaml\nmodel: {num_heads: 2}\n")
    made = []
    for given, named in (((), settings), (({"model": settings},), {}), (("model: " + str(settings).replace("'", ""),), {}),
                         ((tmp_path / "my.yaml",), {})):
        torch.manual_seed(3)
        made.append(libxlstm.make_model(*given, **named))
    assert len({model.settings for model in made}) == 1
    assert len({model.lm_head.weight.sum().item() for model in made}) == 1
    with pytest.raises(libxlstm.Error, match=r"got 'my.yaml'; of a file give its path: pathlib.Path\('my.yaml'\)") as caught:
        libxlstm.make_model("my.yaml")
    assert caught.value.code == 2
    with pytest.raises(libxlstm.Error, match="no.yaml"):
        libxlstm.make_model(tmp_path / "no.yaml")
    with pytest.raises(libxlstm.Error, match="embedding_dmi.*embedding_dim"):
        libxlstm.make_model(embedding_dmi=3)
    for given, named in (((), {}), (({"model": settings},), settings)):
        with pytest.raises(TypeError, match="expected either a configuration or settings of `model` by name"):
            libxlstm.make_model(*given, **named)


def test_what_makes_parameters_elsewhere_is_refused():
    with torch.device("meta"):
        for make in (lambda: libxlstm.make_model(embedding_dim=32), lambda: libxlstm.BlockStack(embedding_dim=32)):
            with pytest.raises(TypeError, match=r"made on meta: it stays the C\+\+ module's own tensor.*init_empty_weights"):
                make()
    before = torch.nn.Module.register_parameter

    def empty(make):  # as accelerate.init_empty_weights() has it
        def register(module, name, parameter):
            before(module, name, parameter)
            module._parameters[name] = make(parameter)

        return register

    try:
        for make in (lambda parameter: type(parameter)(parameter.to("meta"), **parameter.__dict__, requires_grad=True),
                     lambda parameter: torch.nn.Parameter(parameter.to("meta"))):
            torch.nn.Module.register_parameter = empty(make)
            with pytest.raises(TypeError, match="a parameter cannot be made on meta: it stays"):
                libxlstm.make_model(embedding_dim=32)
    finally:
        torch.nn.Module.register_parameter = before


def test_config_is_free_for_others():
    """transformers.Trainer and others set model.config.use_cache = False where there is a config."""
    model = make_model()
    assert not hasattr(model, "config") and "embedding_dim: 32" in model.settings
    model.config = {"mine": 1}
    assert model.config == copy.deepcopy(model).config == {"mine": 1}
