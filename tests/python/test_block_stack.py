"""Blocks for networks of one's own: libxlstm.BlockStack, and batches with padding."""

import copy
import io

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import libxlstm

SETTINGS = {"embedding_dim": 32, "num_blocks": 3, "num_heads": 2, "slstm_at": [1]}
KINDS = ("xlstm", "xlstm_large", "lstm", "llama", "gpt", "mamba", "rwkv4", "rwkv6", "retnet", "gla", "hgrn", "hgrn2", "h3",
         "hyena")


def make_stack(seed=1, **settings):
    torch.manual_seed(seed)
    return libxlstm.BlockStack(**{**SETTINGS, **settings})


def of_kind(kind):
    return {"kind": kind, "slstm_at": [1] if kind == "xlstm" else []}


def leaves(state):
    return [tensor for block in state for tensor in block]


def row_of(state, row):
    """The state of one sequence. Attention keeps the places of padding in front: they count from the end."""
    return [[tensor[row : row + 1] for tensor in block] for block in state]


class Regression(torch.nn.Module):
    """What users build: layers of their own around the blocks."""

    def __init__(self):
        super().__init__()
        self.lift = torch.nn.Linear(5, 32)
        self.stack = make_stack(dropout=0.0)
        self.drop = torch.nn.Linear(32, 2)

    def forward(self, x, state=None):
        y, state = self.stack(self.lift(x), state)
        return self.drop(y), state


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_embedding_stack_and_head(kind):
    torch.manual_seed(3)
    model = libxlstm.make_model({"model": {**SETTINGS, **of_kind(kind), "vocab_size": 300}})
    stack = make_stack(**of_kind(kind))
    names = set(dict(stack.named_parameters()))
    assert names == {name for name in model.state_dict()
                     if name.split(".")[0] not in ("embedding", "position_embedding", "in_norm", "lm_head")}
    stack.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    ids, reset = torch.randint(300, (2, 21)), torch.rand(2, 21) < 0.1
    x = model.embedding.weight[ids]
    if kind == "gpt":
        starts = torch.where(reset, torch.arange(21), 0).cummax(1).values
        x = x + model.position_embedding.weight[torch.arange(21) - starts]
    if kind.startswith("rwkv"):
        x = torch.nn.functional.layer_norm(x, (32,), model.in_norm.weight, model.in_norm.bias)
    y, state = stack(x, reset=reset)
    logits, expected = model(ids, reset=reset)
    torch.testing.assert_close(y @ model.lm_head.weight.T, logits, rtol=1e-4, atol=1e-5)
    for tensor, other in zip(leaves(state), leaves(expected), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_stands_before_it():
    stack = make_stack().double()
    x = torch.randn(2, 9, 32, dtype=torch.double, requires_grad=True)
    direction = torch.randn_like(x)
    y, _ = stack(x)
    assert y.shape == x.shape and y.dtype == torch.double
    (gradient,) = torch.autograd.grad(y.sum(), x)
    step = 1e-6
    with torch.no_grad():
        difference = stack(x + step * direction)[0].sum() - stack(x - step * direction)[0].sum()
    torch.testing.assert_close(difference / (2 * step), (gradient * direction).sum(), rtol=1e-6, atol=1e-6)


def test_gradients_go_back_through_the_state():
    stack = make_stack().double()
    x = torch.randn(2, 12, 32, dtype=torch.double, requires_grad=True)
    whole = stack(x)[0][:, 7:].sum()
    _, state = stack(x[:, :7])
    parted = stack(x[:, 7:], state)[0].sum()
    expected, found = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (whole, parted))
    torch.testing.assert_close(found, expected)
    cut = [[tensor.detach() for tensor in block] for block in state]
    assert not torch.autograd.grad(stack(x[:, 7:], cut)[0].sum(), x)[0][:, :7].any()


def test_a_network_around_it_trains_and_is_kept():
    net = Regression()
    assert all(name in dict(net.named_parameters()) for name in ("lift.weight", "stack.blocks.1.slstm.bias"))
    x = torch.randn(4, 30, 5)
    target = x.cumsum(1)[:, :, :2]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (net(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]

    twin = copy.deepcopy(net)
    assert torch.equal(twin(x)[0], net(x)[0])
    with torch.no_grad():
        twin.stack.blocks.get_submodule("0").norm.weight.mul_(2)
    assert not torch.equal(twin(x)[0], net(x)[0])

    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other = Regression()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x)[0], net(x)[0])

    net.eval()
    assert not net.stack._core.training
    with torch.no_grad():
        whole, _ = net(x)
        first, state = net(x[:, :13])
        torch.testing.assert_close(torch.cat([first, net(x[:, 13:], state)[0]], 1), whole, rtol=1e-4, atol=1e-5)
    assert net.double()(x.double())[0].dtype == torch.double
    with torch.autocast("cpu", torch.bfloat16):
        other(x)[0].float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in other.parameters())


def test_what_a_subclass_has_is_copied_and_converted():
    class Scaled(libxlstm.BlockStack):
        def __init__(self):
            super().__init__(**SETTINGS)
            self.norm = torch.nn.BatchNorm1d(32)
            self.gain = torch.nn.Parameter(torch.tensor(3.0))
            self.label = "mine"

        def forward(self, x):
            return self.gain * self.norm(super().forward(x)[0].transpose(1, 2))

    stack = Scaled()
    seen = []
    stack.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 7, 32)
    expected = stack(x)
    twin = copy.deepcopy(stack)
    assert torch.equal(twin(x), expected) and len(seen) == 2 and twin.label == "mine"
    assert set(twin.state_dict()) == set(stack.state_dict())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in stack.parameters()}
    twin.double()
    assert all(tensor.dtype == torch.double for name, tensor in twin.state_dict().items() if "num_batches" not in name)
    assert stack.norm.running_mean.dtype == torch.float32


def test_modes_of_parts_are_copied():
    stack = make_stack()
    stack.blocks.eval()
    twin = copy.deepcopy(stack)
    assert twin.training and not twin.blocks.training and not twin.blocks[0].training and twin.out_norm.training


def test_a_batch_without_padding_is_an_ordinary_one():
    stack, x = make_stack(), torch.randn(2, 6, 32)
    y, state = stack(x)
    same, end = stack(x, lengths=[6, 6])
    assert torch.equal(same, y) and all(map(torch.equal, sum(end, []), sum(state, [])))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_behind_sequences_changes_nothing(kind):
    stack = make_stack(**of_kind(kind)).double()
    sequences = [torch.randn(length, 32, dtype=torch.double, requires_grad=True) for length in (17, 1, 9, 17, 2)]
    lengths = [len(sequence) for sequence in sequences]
    padded = pad_sequence(sequences, batch_first=True, padding_value=float("nan"))
    y, state = stack(padded, lengths=lengths)
    more = torch.randn(5, 3, 32, dtype=torch.double)
    further = stack(more, state)[0]
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), sequences)
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        alone, own = stack(sequence.unsqueeze(0))
        torch.testing.assert_close(y[row : row + 1, :length], alone)
        assert not y[row, length:].any()
        (expected,) = torch.autograd.grad((alone * weight[row, :length]).sum(), sequence)
        torch.testing.assert_close(gradients[row], expected)
        torch.testing.assert_close(further[row : row + 1], stack(more[row : row + 1], own)[0])


def test_padded_ids_of_a_model():
    torch.manual_seed(5)
    model = libxlstm.make_model({"model": {**SETTINGS, "vocab_size": 300}}).double()
    ids = torch.full((3, 12), -100)
    lengths = torch.tensor([4, 12, 1])
    for row, length in enumerate(lengths.tolist()):
        ids[row, :length] = torch.randint(300, (length,))
    reset = torch.zeros(3, 12, dtype=torch.bool)
    reset[1, 5] = True
    with torch.no_grad():
        logits, state = model(ids, reset=reset, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            alone, own = model(ids[row : row + 1, :length], reset=reset[row : row + 1, :length])
            torch.testing.assert_close(logits[row : row + 1, :length], alone)
            for tensor, other in zip(leaves(row_of(state, row)), leaves(own), strict=True):
                torch.testing.assert_close(tensor, other)


def test_several_prompts_are_continued_side_by_side():
    torch.manual_seed(5)
    model = libxlstm.make_model({"model": {**SETTINGS, "vocab_size": 300}}).double()
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    alone = [model.generate(prompt, 20, seed=11 + i) for i, prompt in enumerate(prompts)]
    told = [[], [], []]
    together = model.generate(prompts, 20, seed=11, on_token=lambda i, id: told[i].append(id))
    assert together == alone == told
    assert model.generate([torch.tensor(prompt) for prompt in prompts], 20, seed=11) == alone
    assert model.generate(torch.tensor([[1, 2], [3, 4]]), 4) == model.generate([[1, 2], [3, 4]], 4)
    stops = model.generate(prompts, 20, seed=11, stop_token=alone[1][4])
    assert stops[1] == alone[1][: alone[1].index(alone[1][4]) + 1]
    assert model.generate([[1]], 3) == [model.generate([1], 3)] and model.generate([[1], [2]], 0) == [[], []]
    for wrong in ([], [[]], [[1], []]):
        with pytest.raises(libxlstm.Error, match="at least one token"):
            model.generate(wrong, 3)
    with pytest.raises(libxlstm.Error, match="300 is outside"):
        model.generate([[1], [300]], 3)


def test_wrong_arguments_are_named():
    stack = make_stack()
    x = torch.randn(2, 6, 32)
    with pytest.raises(RuntimeError, match=r"x: expected \(B,T,32\) floating.*\[2, 6, 31\]"):
        stack(x[..., :31])
    with pytest.raises(RuntimeError, match=r"x: expected \(B,T,32\) floating"):
        stack(torch.ones(2, 6, 32, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"reset: expected \(2,6\) bool"):
        stack(x, reset=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="state: expected one entry for each of 3"):
        stack(x, stack(x)[1][:2])
    for lengths, message in (([6], r"lengths: expected \(2\) int64"), ([6.0, 2.0], "int64"),
                             ([0, 6], "1 to 6.*got 0 for sequence 0"), ([6, 7], "1 to 6.*got 7 for sequence 1")):
        with pytest.raises(ValueError, match=message):
            stack(x, lengths=lengths)
    for reset in (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 6)):
        with pytest.raises(ValueError, match=r"reset: expected \(2,6\) bool, got "):
            libxlstm.make_model({"model": SETTINGS})(torch.ones(2, 6, dtype=torch.long), reset=reset, lengths=[6, 2])
    with pytest.raises(ValueError, match="expected no state"):
        stack(x, stack(x)[1], lengths=[6, 6])
    with pytest.raises(libxlstm.Error, match="num_block.*num_blocks"):
        libxlstm.BlockStack(num_block=3)
    with pytest.raises(libxlstm.Error, match="model.num_heads 5"):
        libxlstm.BlockStack(embedding_dim=32, num_heads=5)
    with pytest.raises(TypeError, match="vocab_size: a setting of embedding or head"):
        libxlstm.BlockStack(vocab_size=300)
    with pytest.raises(RuntimeError, match="a parameter was replaced"):
        torch.func.functional_call(stack, {"out_norm.weight": torch.ones(32)}, (x,))
    assert "xlstm: 3 blocks, width 32" in repr(Regression())
