"""Blocks for networks of one's own: libxlstm.BlockStack, and batches with padding."""

import copy
import io

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence, unpack_sequence, unpad_sequence

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
    with pytest.raises(libxlstm.Error, match="num_block.*num_blocks"):
        libxlstm.BlockStack(num_block=3)
    with pytest.raises(libxlstm.Error, match="model.num_heads 5"):
        libxlstm.BlockStack(embedding_dim=32, num_heads=5)
    with pytest.raises(TypeError, match="vocab_size: a setting of embedding or head"):
        libxlstm.BlockStack(vocab_size=300)
    with pytest.raises(RuntimeError, match="a parameter was replaced"):
        torch.func.functional_call(stack, {"out_norm.weight": torch.ones(32)}, (x,))
    assert "xlstm: 3 blocks, width 32" in repr(Regression())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("llama", "gpt", "hyena")])
def test_sequences_of_unequal_lengths_go_on_from_their_states(kind):
    """Also where one has nothing new: its state stays, to the last bit."""
    stack = make_stack(**of_kind(kind)).double()
    _, state = stack(torch.randn(5, 7, 32, dtype=torch.double), lengths=[7, 2, 5, 1, 7])
    lengths, x = [6, 0, 3, 6, 1], torch.randn(5, 8, 32, dtype=torch.double)
    for row, length in enumerate(lengths):
        x[row, length:] = float("nan")
    reset = torch.zeros(5, 8, dtype=torch.bool)
    reset[0, 2] = reset[3, 4] = True
    x.requires_grad_()
    y, end, (first,) = stack(x, state, reset=reset, lengths=lengths, blocks=[0])
    weight = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
    assert y.shape == first.shape == x.shape and not gradient[1].any()
    for row, length in enumerate(lengths):
        alone, own, (of_first,) = stack(x[row : row + 1, :length], row_of(state, row), reset=reset[row : row + 1, :length],
                                        blocks=[0])
        torch.testing.assert_close(y[row : row + 1, :length], alone)
        torch.testing.assert_close(first[row : row + 1, :length], of_first)
        assert not y[row, length:].any() and not first[row, length:].any() and not gradient[row, length:].any()
        (expected,) = torch.autograd.grad((alone * weight[row, :length]).sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient[row], expected[row])
        for tensor, other in zip(leaves(row_of(end, row)), leaves(own), strict=True):
            torch.testing.assert_close(tensor, other)
    assert all(map(torch.equal, leaves(row_of(end, 1)), leaves(row_of(state, 1))))
    with pytest.raises(ValueError, match="lengths: expected 0 to 8, the length of the batch, got 9 for sequence 4"):
        stack(x, state, lengths=[6, 0, 3, 6, 9])
    with pytest.raises(RuntimeError, match=r"reset: expected \(5,8\) bool"):
        stack(x, state, lengths=lengths, reset=reset[:, :4])


def test_ids_of_unequal_lengths_go_on_from_their_states():
    torch.manual_seed(5)
    model = libxlstm.make_model({"model": {**SETTINGS, "vocab_size": 300}}).double()
    ids, lengths = torch.randint(300, (3, 12)), [4, 12, 0]
    with torch.no_grad():
        _, state = model(torch.randint(300, (3, 5)))
        logits, end = model(ids, state, lengths=lengths)
        for row, length in enumerate(lengths):
            alone, own = model(ids[row : row + 1, :length], row_of(state, row))
            torch.testing.assert_close(logits[row : row + 1, :length], alone)
            for tensor, other in zip(leaves(row_of(end, row)), leaves(own), strict=True):
                torch.testing.assert_close(tensor, other)


@pytest.mark.parametrize("kind", ["llama", "gpt", "hyena"])
def test_where_states_grow_lengths_are_one(kind):
    stack, x = make_stack(**of_kind(kind)), torch.randn(2, 6, 32)
    y, state = stack(x)
    assert torch.equal(stack(x, state, lengths=[6, 6])[0], stack(x, state)[0])
    with pytest.raises(ValueError, match="lengths: expected one length for all sequences.*read those of each length"):
        stack(x, state, lengths=[6, 3])


def test_a_state_that_does_not_fit_is_named():
    stack, x = make_stack(), torch.randn(2, 6, 32)
    model, ids = libxlstm.make_model({"model": SETTINGS}), torch.ones(2, 6, dtype=torch.long)
    checkpointed = make_stack(activation_checkpointing=True)
    _, other = make_stack(slstm_at=[0])(x)
    _, wide = make_stack(embedding_dim=64)(torch.randn(2, 6, 64))
    low = [[tensor.bfloat16() for tensor in block] for block in stack(x)[1]]
    for call in (lambda state: stack(x, state), lambda state: model(ids, state), lambda state: checkpointed(x, state),
                 lambda state: stack(x, state, lengths=[6, 2]), lambda state: model(ids, state, lengths=[6, 2]),
                 lambda state: model.hidden(ids, state, blocks=[0]), lambda state: model(ids, state, targets=ids)):
        for state, message in (
            (stack(x[:1].expand(3, -1, -1))[1], "^state: expected one of 2 sequences, as the batch has them, got one of 3"),
            (stack(x[:1])[1], "^state: expected one of 2 sequences, as the batch has them, got one of 1 in block 0"),
            (other, "^state: block 0: expected 4 tensors, got 5"),
            (wide, r"^state: block 0: expected tensor 0 \[\d, 3, 64\] Float on cpu, got \[\d, 3, 128\] Float on cpu; the"),
            (low, r"^state: block 0: expected tensor 0 \[\d, 3, 64\] Float on cpu, got \[\d, 3, 64\] BFloat16 on cpu; the"),
            ([[], stack(x)[1][0], []], "^state: block 1: expected 5 tensors, got 4"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(state)
    with pytest.raises(TypeError, match="state: expected None or what a call returned"):
        stack(x, torch.zeros(2))


def test_states_are_cut_split_and_merged():
    stack, x = make_stack(), torch.randn(3, 6, 32, requires_grad=True)
    _, state = stack(x)
    cut = libxlstm.detach(state)
    assert all(map(torch.equal, leaves(cut), leaves(state)))
    assert any(t.requires_grad for t in leaves(state)) and not any(t.requires_grad for t in leaves(cut))
    kept = libxlstm.split_state(cut)  # of three clients, who come back in another company
    assert len(kept) == 3 and {tensor.size(0) for one in kept for tensor in leaves(one)} == {1}
    assert not {t.data_ptr() for one in kept for t in leaves(one)} & {t.data_ptr() for t in leaves(cut)}
    together = libxlstm.merge_states([kept[2], kept[0]])
    more = torch.randn(2, 4, 32)
    y, _ = stack(more, together)
    torch.testing.assert_close(y[1:], stack(more[1:], kept[0])[0], rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, leaves(libxlstm.merge_states([libxlstm.merge_states(kept[:2]), kept[2]])), leaves(cut)))
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-3)
    state = None
    for piece in torch.randn(3, 2, 5, 32):  # truncated backpropagation through time
        y, state = stack(piece, libxlstm.detach(state))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_are_read_as_by_an_lstm(enforce_sorted):
    stack = make_stack()
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 6, 1, 4]
    sequences = [torch.randn(length, 32) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted)
    padded = pad_sequence(sequences, batch_first=True)
    expected, expected_state = stack(padded, lengths=lengths)
    y, state = stack(packed)
    assert type(y) is type(packed) and torch.equal(y.batch_sizes, packed.batch_sizes)
    assert all(map(torch.equal, leaves(state), leaves(expected_state)))
    assert all(map(torch.equal, unpack_sequence(y), unpad_sequence(expected, torch.tensor(lengths), batch_first=True)))
    for ours, theirs in zip(y[2:], torch.nn.LSTM(32, 32, batch_first=True)(packed)[0][2:]):  # the orders
        assert ours is theirs or torch.equal(ours, theirs)
    further, _ = stack(packed, state)
    torch.testing.assert_close(pad_packed_sequence(further, batch_first=True)[0],
                               stack(padded, expected_state, lengths=lengths)[0])
    with pytest.raises(TypeError, match="x: a PackedSequence has its own lengths.*pad_packed_sequence"):
        stack(packed, lengths=lengths)
    with pytest.raises(TypeError, match="ids: .*got a PackedSequence.*lengths="):
        libxlstm.make_model(**SETTINGS)(pack_sequence([torch.tensor([1, 2]), torch.tensor([3])]))


def test_settings_make_another_one():
    stack = make_stack(slstm_at=range(1, 2), mlstm={"proj_factor": 1.5})
    assert stack.settings == {**SETTINGS, "slstm_at": [1], "mlstm": {"proj_factor": 1.5}}
    file = io.BytesIO()
    torch.save({"settings": stack.settings, "weights": stack.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file)
    other = libxlstm.BlockStack(**kept["settings"])
    other.load_state_dict(kept["weights"])
    x = torch.randn(2, 6, 32)
    assert torch.equal(other(x)[0], stack(x)[0])
    other.settings["mlstm"]["proj_factor"] = 3  # of a copy
    assert other.settings == copy.deepcopy(other).settings == stack.settings
