"""accelerate(): the xlstm package's small models compute the same as before."""

import copy

import pytest
import torch
from test_accelerate import (
    accelerated,
    check_close,
    check_gradients,
    check_low_precision,
    cross_entropy,
    make_small,
    one_thread,
    random_ids,
    randomize,
)  # one_thread is a fixture

import libxlstm

SMALL = [
    {},
    {"slstm_at": [], "bias": True, "slstm_block": None},
    {"slstm_at": "all", "mlstm_block": None, "slstm_block__slstm__function": "lstm"},
    {"mlstm_block__mlstm__conv1d_kernel_size": 2, "slstm_block__slstm__conv1d_kernel_size": 8},
    {"slstm_block__slstm__group_norm_weight": False, "slstm_block__slstm__gradient_recurrent_cut": True},
    {"mlstm_block__mlstm__qkv_proj_blocksize": 16, "mlstm_block__mlstm__num_heads": 2},
]


@pytest.mark.parametrize("changes", SMALL)
def test_small_losses_and_gradients(changes):
    theirs = make_small(**changes)
    ours = accelerated(theirs)
    for batch, time in ((3, 21), (1, 2), (2, 24)):
        ids = random_ids(batch, time)
        with torch.no_grad():
            check_close(ours(ids), theirs(ids))
        check_gradients(ours, theirs, lambda model: cross_entropy(model(ids), ids))
    ours, theirs = ours.double(), theirs.double()
    # Its mLSTM's m begins without an empty state's 0, which its epsilon shows.
    check_gradients(ours, theirs, lambda model: cross_entropy(model(ids), ids), 1e-5)


@pytest.mark.parametrize("changes", SMALL)
def test_small_steps(changes):
    theirs = make_small(**changes)
    ours = accelerated(theirs)
    ids, states = random_ids(2, 20), (None, None)
    for grad in (False, True):  # from the states of the first pass
        with torch.set_grad_enabled(grad):
            for t in range(20):
                (logits, state), (expected, expected_state) = (
                    model.step(ids[:, t : t + 1], state) for model, state in zip((ours, theirs), states))
                check_close(logits, expected)
                states = state, expected_state
            for block, parts in expected_state.items():
                assert state[block].keys() == parts.keys()
                for name, tensors in parts.items():
                    for mine, its in zip(state[block][name], tensors, strict=True):
                        check_close(mine, its)


def test_small_step_has_gradients():
    theirs = make_small()
    ids = random_ids(2, 6)
    with torch.no_grad():
        state = None
        for t in range(5):
            _, state = theirs.step(ids[:, t : t + 1], state)
    check_gradients(accelerated(theirs), theirs,
                    lambda model: model.step(ids[:, 5:], copy.deepcopy(state))[0].square().mean())


def test_small_in_bfloat16_and_under_autocast():
    theirs = make_small()
    ours, ids = accelerated(theirs), random_ids(2, 21)
    with torch.no_grad():
        exact = theirs(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_low_precision(ours(ids), theirs(ids), exact)
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
        check_low_precision(ours(ids), theirs(ids), exact)
        state = expected_state = None
        for t in range(5):
            _, state = ours.step(ids[:, t : t + 1], state)
            _, expected_state = theirs.step(ids[:, t : t + 1], expected_state)
        for block, parts in expected_state.items():
            for name, tensors in parts.items():
                for mine, its in zip(state[block][name], tensors, strict=True):
                    check_close(mine, its, 0.1)


def test_small_takes_texts_beyond_its_context():
    ids, theirs = random_ids(1, 50), make_small(context_length=60)
    ours = accelerated(make_small(context_length=8))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        check_close(ours(ids), theirs(ids))


@pytest.mark.parametrize("state", ["none", "zeros", "of before"])
def test_small_slstm_layer_carries_its_state(state):
    theirs = make_small(slstm_at="all", mlstm_block=None).xlstm_block_stack.blocks[1].xlstm
    ours = accelerated(theirs)
    torch.manual_seed(4)
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        before = {}
        if state == "zeros":
            before = {"conv_state": torch.zeros(2, 3, 32), "slstm_state": torch.zeros(4, 2, 32)}
        elif state == "of before":
            before = theirs(torch.randn(2, 5, 32), return_last_state=True)[1]
        (y, last), (expected, expected_last) = (layer(x, return_last_state=True, **before) for layer in (ours, theirs))
        check_close(y, expected)
        for name in ("conv_state", "slstm_state"):
            check_close(last[name], expected_last[name])
        # Fewer tokens than the convolution sees: theirs returns what there is.
        assert ours(x[:, :2], return_last_state=True)[1]["conv_state"].shape == (2, 2, 32)


@pytest.mark.parametrize("function", ["slstm", "lstm"])
@pytest.mark.parametrize("input_shape", ["BSGNH", "SBGNH"])
@pytest.mark.parametrize("output_shape", ["BNSH", "SBH", "BSH", "SBNH"])
def test_small_slstm_cells_of_both_backends(function, input_shape, output_shape):
    """The CUDA backend's parameters have another layout; without a GPU it computes here alone."""
    cell = pytest.importorskip("xlstm.blocks.slstm.cell")
    settings = {"hidden_size": 24, "num_heads": 3, "function": function, "dtype": "float32", "input_shape": input_shape,
                "output_shape": output_shape}
    vanilla = randomize(cell.sLSTMCell_vanilla(cell.sLSTMCellConfig(backend="vanilla", **settings)))
    cuda = cell.sLSTMCell_cuda(cell.sLSTMCellConfig(**settings), skip_backend_init=True)
    with torch.no_grad():
        cuda._recurrent_kernel_.copy_(cuda._recurrent_kernel_ext2int(vanilla.recurrent_kernel.clone()))
        cuda._bias_.copy_(cuda._bias_ext2int(vanilla.bias.clone()))
    x = torch.randn((2, 7, 96) if input_shape == "BSGNH" else (7, 2, 96))
    expected, expected_state = vanilla(x)
    for ours in (accelerated(vanilla), libxlstm.accelerate(cuda)):
        y, state = ours(x)
        check_close(y, expected)
        check_close(state, expected_state)
        again, expected_again = ours(x, state)[0], vanilla(x, expected_state)[0]
        check_close(again, expected_again)
    cuda.config.dtype_w = cuda.config.dtype_r = "bfloat16"
    check_close(cuda(x)[0], expected, 3e-2)


def test_small_slstm_that_cuts_its_recurrent_gradient():
    """Of the CUDA backend alone: the other has the setting and does not look at it."""
    cell = pytest.importorskip("xlstm.blocks.slstm.cell")
    settings = {"hidden_size": 12, "num_heads": 3, "dtype": "float32", "gradient_recurrent_cut": True}
    theirs = randomize(cell.sLSTMCell_vanilla(cell.sLSTMCellConfig(backend="vanilla", **settings)))
    ours = cell.sLSTMCell_cuda(cell.sLSTMCellConfig(**settings), skip_backend_init=True)
    with torch.no_grad():
        ours._recurrent_kernel_.copy_(ours._recurrent_kernel_ext2int(theirs.recurrent_kernel.clone()))
        ours._bias_.copy_(ours._bias_ext2int(theirs.bias.clone()))
    pointwise, outputs = theirs.pointwise, []

    def cut(*inputs, constants):
        states, gates = pointwise(*inputs, constants=constants)
        outputs.append(states[0])
        return torch.cat([states[:1].detach(), states[1:]]), gates

    theirs.pointwise = cut
    x = torch.randn(2, 7, 48, requires_grad=True)
    theirs(x)
    weight = torch.randn(2, 7, 12)
    expected = torch.autograd.grad((torch.stack(outputs, 1) * weight).sum(), [x, theirs._recurrent_kernel_])
    y = libxlstm.accelerate(ours)(x)[0].transpose(1, 2).flatten(2)
    gradients = torch.autograd.grad((y * weight).sum(), [x, ours._recurrent_kernel_])
    check_close(gradients[0], expected[0])
    with torch.no_grad():
        theirs._recurrent_kernel_.copy_(expected[1])
    check_close(gradients[1], ours._recurrent_kernel_ext2int(theirs.recurrent_kernel.clone()))


def test_small_convolution_alone():
    conv = pytest.importorskip("xlstm.components.conv")
    for bias in (True, False):
        theirs = conv.CausalConv1d(conv.CausalConv1dConfig(feature_dim=6, kernel_size=4, causal_conv_bias=bias))
        ours = accelerated(theirs)
        x, state = torch.randn(2, 9, 6), torch.randn(2, 3, 6)
        check_close(ours(x), theirs(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_close(ours(x), theirs(x), 3e-2)
        for mine, its in zip(ours(x, state, True), theirs(x, state, True), strict=True):
            check_close(mine, its)
        check_close(ours(x, state[:, :2]), theirs(x, state[:, :2]))  # a window of another length
        window, twin = torch.randn(2, 4, 6), None
        with torch.no_grad():
            twin = window.clone()
            for t in range(6):
                (y, (window,)), (expected, (twin,)) = (
                    module.step(x[:, t : t + 1], (its,)) for module, its in ((ours, window), (theirs, twin)))
                check_close(y, expected)
                assert torch.equal(window, twin)


def test_small_inner_modules_may_be_hooked_or_wrapped():
    theirs = make_small(slstm_at=[], slstm_block=None)
    ours = accelerated(theirs)
    seen = []
    layers = [block.xlstm for block in ours.xlstm_block_stack.blocks]
    hooked = (layers[0].conv1d, layers[1].mlstm_cell.outnorm, layers[2].conv_act_fn, layers[3].conv1d.conv)
    for module in hooked:
        module.register_forward_hook(lambda module, inputs, output: seen.append(module))
    ids = random_ids(2, 21)
    with torch.no_grad():
        check_close(ours(ids), theirs(ids))
        assert seen == list(hooked)
        check_close(ours.step(ids[:, :1])[0], theirs.step(ids[:, :1])[0])
