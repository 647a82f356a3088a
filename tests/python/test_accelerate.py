"""accelerate(): models of transformers and of the xlstm package compute the same as before, by other means."""

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import libxlstm

WITHOUT_XLSTM = "TEST_TRANSFORMERS_WITHOUT_XLSTM"  # in the environment: as where the xlstm package is not installed
VOCABULARY = 90
NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    "autocast_kernel_dtype": "float32", "chunk_size": 16,
}


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith("bias") else 0.15)
    return model


def make_transformers(**changes):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "xLSTMForCausalLM"):
        pytest.skip("this transformers has no xLSTM")
    if os.environ.get(WITHOUT_XLSTM):
        import transformers.utils

        transformers.utils.is_xlstm_available = lambda: False
    settings = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "use_cache": False,
                "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, **NATIVE, **changes}
    fused = settings.pop("weight_mode", "single") == "fused"
    config = transformers.xLSTMConfig(**settings)
    if fused:  # as its own initialisation fails there
        config.weight_mode = "fused"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.xLSTMPreTrainedModel, "_init_weights", lambda self, module: None)
            return randomize(transformers.xLSTMForCausalLM(config)).eval()
    return randomize(transformers.xLSTMForCausalLM(config)).eval()


def make_large(**changes):
    model = pytest.importorskip("xlstm.xlstm_large.model")
    settings = {"vocab_size": VOCABULARY, "embedding_dim": 128, "num_blocks": 2, "num_heads": 2, "mode": "inference",
                "return_last_states": True, **NATIVE, **changes}
    return randomize(model.xLSTMLarge(model.xLSTMLargeConfig(**settings))).eval()


def make_small(**changes):
    pytest.importorskip("xlstm")
    pytest.importorskip("safetensors")
    from test_convert import make_config, make_model

    return make_model(make_config(vocab_size=VOCABULARY, **changes))


def accelerated(model):
    """A copy that computes by the operators; nothing in it may be left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return libxlstm.accelerate(copy.deepcopy(model))


def random_ids(batch, time):
    torch.manual_seed(2)
    return torch.randint(1, VOCABULARY, (batch, time))


def check_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= tolerance * max(1e-3, theirs.abs().max())


def check_gradients(ours, theirs, loss_of, tolerance=2e-4):
    """Every parameter's; the default is what two roundings to float32 leave of the smallest ones."""
    losses = []
    for model in (ours, theirs):
        model.zero_grad()
        losses.append(loss_of(model))
        losses[-1].backward()
    check_close(*losses, min(tolerance, 1e-5))
    expected = dict(theirs.named_parameters())
    assert sorted(expected) == sorted(dict(ours.named_parameters()))
    largest = max(parameter.grad.abs().max() for parameter in expected.values())
    for name, parameter in ours.named_parameters():
        scale = max(expected[name].grad.abs().max(), 1e-3 * largest)
        assert (parameter.grad - expected[name].grad).abs().max() <= tolerance * scale, name


def check_low_precision(ours, theirs, exact):
    """No further from the float32 result than twice what theirs is."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours.float() - exact).abs().max() <= 2 * (theirs.float() - exact).abs().max() < exact.abs().max()


def cross_entropy(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def stand_ins(model):
    return {name for name, module in model.named_modules() if type(module).__module__.startswith("libxlstm.accelerated")}


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers_loss(ids, **more):
    return lambda model: model(ids, labels=ids, **more).loss


@pytest.mark.parametrize(
    ("changes", "time"),
    [
        ({}, 45), ({}, 1), ({}, 64),
        ({"hidden_size": 192, "num_heads": 3, "qk_dim_factor": 1.0, "v_dim_factor": 2.0}, 33),
        ({"use_bias": True, "norm_reduction_force_float32": False}, 37),
        ({"gate_soft_cap": 4.0, "norm_eps": 1e-2, "eps": 1e-2}, 50),
        ({"weight_mode": "fused"}, 45),
        ({"mode": "train"}, 48),
    ],
)
def test_transformers_losses_and_gradients(changes, time):
    theirs = make_transformers(**changes)
    ours = accelerated(theirs)
    blocks = [f"backbone.blocks.{i}." for i in range(2)]
    parts = ("norm_mlstm", "norm_ffn", "mlstm_layer", "mlstm_layer.mlstm_backend", "mlstm_layer.multihead_norm")
    assert stand_ins(ours) == {"backbone.out_norm", *(block + part for block in blocks for part in parts)}
    ids = random_ids(3, time)
    with torch.no_grad():
        check_close(ours(ids).logits, theirs(ids).logits)
    # A single token has nothing to predict: its logits' sum in place of a loss.
    loss = transformers_loss(ids) if time > 1 else lambda model: model(ids).logits.square().mean()
    # eps reaches m in theirs, which is held constant here.
    check_gradients(ours.train(), theirs.train(), loss, 1e-2 if "eps" in changes else 2e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_transformers_generates_the_same_tokens(batch):
    theirs = make_transformers(max_inference_chunksize=20)  # prompts of more come in chunks
    ours = accelerated(theirs)
    for time in (1, 7, 45):
        ids = random_ids(batch, time)
        more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False, "use_cache": True}
        assert torch.equal(ours.generate(ids, **more), theirs.generate(ids, **more))


def test_transformers_in_float64():
    """Where rounding hides nothing: a wrong gate, scale or epsilon would show."""
    theirs = make_transformers(norm_reduction_force_float32=False, eps=0.0).double()
    theirs.backbone.out_norm.force_float32_reductions = False  # which has no setting
    ours, ids = accelerated(theirs), random_ids(2, 37)
    check_gradients(ours.backbone, theirs.backbone, lambda model: model(ids)[0].square().sin().mean(), 1e-9)


TURNS = ((0, 20), (20, 53), (53, 54), (54, 55), (55, 60))  # tokens of a text that come in one call


def turns(model, ids):
    """The logits of all calls, and the cache behind each."""
    logits, caches, cache = [], [], None
    with torch.no_grad():
        for begin, end in TURNS:
            result = model(ids[:, begin:end], cache_params=cache, use_cache=True)
            cache = result.cache_params
            logits.append(result.logits)
            caches.append([[state.clone() for state in states] for states in cache.rnn_state.values()])
    return torch.cat(logits, 1), caches


def test_transformers_caches():
    theirs, ids = make_transformers(), random_ids(2, 60)
    (logits, caches), (expected, expected_caches) = turns(accelerated(theirs), ids), turns(theirs, ids)
    check_close(logits, expected)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        for states, expected_states in zip(cache, expected_cache, strict=True):
            for state, its in zip(states, expected_states, strict=True):
                check_close(state, its)


def test_transformers_in_bfloat16():
    theirs, ids = make_transformers(), random_ids(2, 60)
    exact, _ = turns(theirs, ids)
    theirs.bfloat16()
    (logits, caches), (expected, expected_caches) = turns(accelerated(theirs), ids), turns(theirs, ids)
    check_low_precision(logits, expected, exact)
    dtypes = [state.dtype for cache in caches for states in cache for state in states]
    assert dtypes == [state.dtype for cache in expected_caches for states in cache for state in states]


def test_transformers_under_autocast():
    theirs = make_transformers()
    ours, ids = accelerated(theirs), random_ids(2, 45)
    exact = theirs(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_low_precision(ours(ids).logits, theirs(ids).logits, exact)
        loss = transformers_loss(ids)(ours.train())
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in ours.parameters())


def test_transformers_gradient_checkpointing():
    theirs = make_transformers()
    ours = accelerated(theirs).train()
    ours.gradient_checkpointing_enable()
    check_gradients(ours, theirs.train(), transformers_loss(random_ids(2, 45)))


def test_transformers_trains_with_a_cache():
    """The default of its configuration, with which its own backward pass finds the states written over."""
    theirs = make_transformers()
    ours, ids = accelerated(theirs).train(), random_ids(2, 45)
    check_gradients(ours, theirs.train(), lambda model: model(ids, labels=ids, use_cache=model is ours).loss)


def test_transformers_files_stay_as_they_were(tmp_path):
    theirs = make_transformers()
    ours = accelerated(theirs)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    loaded = libxlstm.accelerate(type(theirs).from_pretrained(tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(loaded(random_ids(1, 9)).logits, ours(random_ids(1, 9)).logits)


class LowRank(nn.Module):
    """As adapters wrap a layer: in its place, and with it inside."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def adapt(model):
    torch.manual_seed(3)
    layer = model.backbone.blocks[1].mlstm_layer
    for name in ("q", "igate_preact", "ogate_preact", "out_proj"):
        setattr(layer, name, LowRank(getattr(layer, name)))
    return model


@pytest.mark.parametrize("order", ["adapted first", "accelerated first"])
def test_transformers_with_adapters(order):
    theirs = make_transformers()
    ours = accelerated(adapt(copy.deepcopy(theirs))) if order == "adapted first" else adapt(accelerated(theirs))
    check_gradients(ours.train(), adapt(theirs).train(), transformers_loss(random_ids(2, 21)))


def test_transformers_with_peft():
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["q", "out_proj", "proj_down"], modules_to_save=["multihead_norm"],
                                 init_lora_weights=False)
        return peft.get_peft_model(model, config)

    theirs = make_transformers()
    ids = random_ids(2, 21)
    expected = wrap(copy.deepcopy(theirs)).eval()
    for ours in (wrap(accelerated(theirs)), accelerated(wrap(copy.deepcopy(theirs)))):
        with torch.no_grad():
            check_close(ours.eval()(ids).logits, expected(ids).logits)
        ours(ids, labels=ids).loss.backward()
        assert {name for name, p in ours.named_parameters() if p.grad is not None} == {
            name for name, p in expected.named_parameters() if p.requires_grad}
        assert ours.state_dict().keys() == expected.state_dict().keys()
        check_close(ours.merge_and_unload()(ids).logits, expected(ids).logits)


def test_transformers_hooks_are_called():
    theirs = make_transformers()
    ours = accelerated(theirs)
    seen = []
    layer = ours.backbone.blocks[0].mlstm_layer
    for part in (layer.multihead_norm, layer.ogate_act_fn, layer.mlstm_backend):
        part.register_forward_hook(lambda module, inputs, output: seen.append(module))
    ids = random_ids(2, 21)
    with torch.no_grad():
        check_close(ours(ids).logits, theirs(ids).logits)
    assert seen == [layer.mlstm_backend, layer.multihead_norm, layer.ogate_act_fn]


def test_transformers_compiles():
    ours = accelerated(make_transformers())
    ids = random_ids(2, 21)
    compiled = torch.compile(ours.backbone.blocks[0], backend="aot_eager", fullgraph=True)
    x = ours.backbone.embeddings(ids).detach()
    check_close(compiled(x)[0], ours.backbone.blocks[0](x)[0])


def test_transformers_without_the_xlstm_package():
    if os.environ.get(WITHOUT_XLSTM):
        pytest.skip("this is the run that the test starts")
    pytest.importorskip("transformers")
    environment = os.environ | {WITHOUT_XLSTM: "1", "PYTHONPATH": str(Path(libxlstm.__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "transformers", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 18, done.stdout + done.stderr


# ---- xLSTMLarge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "time"), [({}, 45), ({"mode": "train"}, 48), ({"weight_mode": "fused"}, 19),
                                               ({"use_bias": True, "add_out_norm": False}, 30),
                                               ({"chunkwise_kernel": "chunkwise--native_custbw"}, 45)])
def test_large_losses_and_gradients(changes, time):
    theirs = make_large(**changes)
    ours, ids = accelerated(theirs), random_ids(3, time)
    # The hand-written gradients of theirs leave out the normaliser's.
    tolerance = 1e-3 if "chunkwise_kernel" in changes else 2e-4
    check_gradients(ours, theirs, lambda model: cross_entropy(model(ids)[0], ids), tolerance)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_large_in_float64(weight_mode):
    theirs = make_large(norm_reduction_force_float32=False, eps=0.0, weight_mode=weight_mode, use_bias=True).double()
    ours, ids = accelerated(theirs), random_ids(2, 37)
    check_gradients(ours, theirs, lambda model: cross_entropy(model(ids)[0], ids), 1e-9)


def test_large_states_and_generation():
    theirs = make_large()
    ours = accelerated(theirs)
    states, ids = (None, None), random_ids(2, 50)
    with torch.no_grad():
        for begin, end in ((0, 21), (21, 22), (22, 23), (23, 50)):
            (logits, state), (expected, expected_state) = (
                model(ids[:, begin:end], state) for model, state in zip((ours, theirs), states))
            check_close(logits, expected)
            states = state, expected_state
            for block in range(2):
                for mine, its in zip(state[block], expected_state[block], strict=True):
                    check_close(mine, its)
    tokens, _ = ours.generate(ids, 30)
    assert torch.equal(tokens, theirs.generate(ids, 30)[0])


def test_large_step_leaves_the_states_that_it_was_given():
    layer = accelerated(make_large()).backbone.blocks[0]
    x = torch.randn(2, 1, 128)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 5, 128))
        before = [part.clone() for part in state]
        once, twice = layer(x, state)[0], layer(x, state)[0]
    assert torch.equal(once, twice) and all(map(torch.equal, before, state))


@pytest.mark.parametrize(("mode", "time"), [("train", 16), ("train_with_padding", 37), ("inference", 1), ("inference", 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_backend(mode, time, dtype):
    """Alone, from states, and what comes out in which dtype."""
    kernels = pytest.importorskip("mlstm_kernels.torch.backend_module")
    theirs = kernels.mLSTMBackend(
        kernels.mLSTMBackendConfig(mode=mode, return_last_states=mode != "train_with_padding", **NATIVE))
    ours = accelerated(theirs)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, time, size, dtype=dtype) for size in (8, 8, 12)]
    inputs += [torch.randn(2, 3, time, dtype=dtype) for _ in range(2)]
    states = [torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8), torch.randn(2, 3, 1)]
    states = [state.to(dtype) for state in states]
    if dtype == torch.bfloat16:
        tolerance = 5e-2
    else:  # theirs keeps single steps in float32
        tolerance = 1e-5 if dtype == torch.float32 or time == 1 else 1e-7
    results = [model(*inputs, *states) for model in (ours, theirs)]
    if mode == "train_with_padding":
        check_close(*results, tolerance)
        return
    (h, last), (expected, expected_last) = results
    check_close(h, expected, tolerance)
    for state, expected in zip(last, expected_last, strict=True):
        check_close(state, expected, tolerance)


# ---- Any model -------------------------------------------------------------------------------------------------------


def make_any():
    for make in (make_transformers, make_large, make_small):
        try:
            return make()
        except pytest.skip.Exception:
            continue
    pytest.skip("none of the packages is installed")


def test_nothing_but_classes_changes():
    theirs = make_any()
    ours = accelerated(theirs)
    assert libxlstm.accelerate(ours) is ours
    for (name, tensor), (expected_name, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == expected_name and torch.equal(tensor, expected)
    assert repr(ours) == repr(theirs) and type(ours) is type(theirs)
    for (name, module), (expected_name, expected) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert name == expected_name and isinstance(module, type(expected))
        assert vars(module).keys() == vars(expected).keys()


def test_undo():
    theirs = make_any()
    ours = accelerated(theirs)
    assert stand_ins(ours)
    assert libxlstm.accelerate(ours, enabled=False) is ours and not stand_ins(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


def test_copies_stay_accelerated():
    ours = accelerated(make_any())
    assert stand_ins(copy.deepcopy(ours)) == stand_ins(ours)


def test_what_is_not_covered_is_told_once():
    pytest.importorskip("xlstm")
    from xlstm.components.conv import CausalConv1d, CausalConv1dConfig

    class Mine(CausalConv1d):
        pass

    wide, mixing = CausalConv1dConfig(feature_dim=4, kernel_size=9), CausalConv1dConfig(feature_dim=4, channel_mixing=True)
    model = nn.Sequential(CausalConv1d(wide), CausalConv1d(wide), CausalConv1d(mixing), Mine(mixing), nn.Linear(4, 4))
    model.append(CausalConv1d(CausalConv1dConfig(feature_dim=4)))
    model[5].forward = model[5].forward
    with pytest.warns(UserWarning) as told:
        libxlstm.accelerate(model)
    texts = [str(each.message) for each in told]
    assert len(texts) == 4 and all(each.filename == __file__ for each in told)
    parts = ("kernel_size 9, expected 2 to 8; left as it is: 0 and 1 more", "channel_mixing", "Mine: a class of", "another forward")
    assert all(part in text for text, part in zip(texts, parts))
    assert not stand_ins(model)


def test_options_that_are_not_covered():
    slstm = pytest.importorskip("xlstm.blocks.slstm.cell")
    kernels = pytest.importorskip("mlstm_kernels.torch.backend_module")
    clipped = slstm.sLSTMCell_cuda(
        slstm.sLSTMCellConfig(hidden_size=8, num_heads=2, gradient_recurrent_clipval=1.0), skip_backend_init=True)
    sigmoid = kernels.mLSTMBackend(
        kernels.mLSTMBackendConfig(chunkwise_kernel="parallel--native_siging_autograd", return_last_states=False))
    backend = make_small(slstm_at=[], slstm_block=None).xlstm_block_stack.blocks[0].xlstm.mlstm_cell
    backend.backend_fn = print
    for module, part in ((clipped, "gradient_recurrent_clipval 1.0"), (sigmoid, "siging"), (backend, "backend function")):
        with pytest.warns(UserWarning, match=part):
            libxlstm.accelerate(module)


def test_newer_packages_are_left_alone(monkeypatch):
    from libxlstm import accelerated as package

    model = make_any()
    monkeypatch.setattr(package, "_KNOWN_VERSIONS", dict.fromkeys(package._KNOWN_VERSIONS, 0))
    package._unknown_version.cache_clear()
    with pytest.warns(UserWarning, match="is newer than the 0.x known here"):
        libxlstm.accelerate(model)
    package._unknown_version.cache_clear()
    assert not stand_ins(model)


def test_a_model_without_such_cells_is_told():
    with pytest.warns(UserWarning, match="found no cell"):
        libxlstm.accelerate(nn.Linear(3, 3))
