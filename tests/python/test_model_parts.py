"""What may be done with a model beside calling it: its parts, its hidden vectors, arguments as they come, other settings."""

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
    with pytest.raises(AttributeError, match="Model.hidden"):
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


def test_arguments_as_they_come():
    model = make_model()
    ids = random_ids(2, 7)
    expected = model(ids)[0]
    for given in (ids.tolist(), ids.numpy(), ids.int(), ids.short()):
        assert torch.equal(model(given)[0], expected)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 3] = True
    assert torch.equal(model(ids, reset=reset.long())[0], model(ids, reset=reset)[0])
    for state in ([None] * 3, 5, [[1.0]]):
        with pytest.raises(TypeError, match="state: expected None or what a call returned"):
            model(ids, state)
    with pytest.raises(ValueError, match="model.tokenizer.encode"):
        model.generate("text")
    with pytest.raises(TypeError, match=r"x: expected torch.float32.*got torch.float64"):
        libxlstm.BlockStack(embedding_dim=32, num_blocks=1)(torch.ones(1, 2, 32, dtype=torch.float64))


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


def test_a_checkpoint_with_other_settings(tmp_path):
    make_model().save(tmp_path / "model")
    dropping = libxlstm.load(tmp_path / "model", settings={"model": {"dropout": 0.5, "activation_checkpointing": True}}).train()
    ids = random_ids(2, 7)
    assert not torch.equal(dropping(ids)[0], dropping(ids)[0]) and "dropout: 0.5" in dropping.config
    assert torch.equal(dropping.eval()(ids)[0], libxlstm.load(tmp_path / "model")(ids)[0])
    for settings, message in (({"model": {"num_blocks": 4}}, "does not fit"), ({"model": {"dropou": 0.5}}, "dropou.*dropout"),
                              ({"model": {"dropout": 2}}, "model.dropout")):
        with pytest.raises(libxlstm.Error, match=message):
            libxlstm.load(tmp_path / "model", settings=settings)
