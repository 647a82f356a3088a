"""The models that xLSTM is compared with: their recurrences against plain loops, whole models against transformers."""

import pytest
import torch

import libxlstm

WKV_NAMES = ("k", "v", "w", "u", "a0", "b0")


def wkv_loop(k, v, w, u, a0=None, b0=None, p0=None, reset=None):
    """Unstabilised sums, straight from the definition."""
    a = torch.zeros_like(k[:, 0]) if a0 is None else a0 * torch.exp(p0)
    b = torch.zeros_like(k[:, 0]) if b0 is None else b0 * torch.exp(p0)
    out = []
    for t in range(k.shape[1]):
        if reset is not None:
            a, b = (torch.where(reset[:, t, None], torch.zeros_like(s), s) for s in (a, b))
        now = torch.exp(u + k[:, t])
        out.append((a + now * v[:, t]) / (b + now))
        a = torch.exp(-w) * a + torch.exp(k[:, t]) * v[:, t]
        b = torch.exp(-w) * b + torch.exp(k[:, t])
    return torch.stack(out, 1), a, b


def scan_loop(x, delta, a, b, c, skip, state0=None, reset=None):
    h = x.new_zeros(x.shape[0], x.shape[2], a.shape[1]) if state0 is None else state0
    out = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], torch.zeros_like(h), h)
        d = delta[:, t, :, None]
        h = torch.exp(d * a) * h + d * b[:, t, None, :] * x[:, t, :, None]
        out.append((h * c[:, t, None, :]).sum(-1) + skip * x[:, t])
    return torch.stack(out, 1), h


def wkv_arguments(batch, time, dim, states, dtype=torch.float64):
    torch.manual_seed(batch + 10 * time + dim)
    make = lambda *s: torch.randn(*s, dtype=dtype)  # noqa: E731
    arguments = [make(batch, time, dim) * 2, make(batch, time, dim), make(dim).exp(), make(dim)]
    return arguments + ([make(batch, dim), make(batch, dim).exp(), make(batch, dim)] if states else [None] * 3)


def scan_arguments(batch, time, dim, n, states, dtype=torch.float64):
    torch.manual_seed(batch + 10 * time + dim)
    make = lambda *s: torch.randn(*s, dtype=dtype)  # noqa: E731
    arguments = [make(batch, time, dim), make(batch, time, dim).exp(), -make(dim, n).exp(), make(batch, time, n),
                 make(batch, time, n), make(dim)]
    return arguments + [make(batch, dim, n) if states else None]


def with_gradients(tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def resets(batch, time):
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[0, time // 2] = True
    reset[-1, 0] = True
    return reset


@pytest.mark.parametrize("batch, time, dim", [(1, 1, 1), (2, 7, 5), (3, 33, 17), (1, 20, 130)])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_wkv_is_its_definition(batch, time, dim, states, with_reset):
    arguments = wkv_arguments(batch, time, dim, states)
    reset = resets(batch, time) if with_reset else None
    ours, loop = with_gradients(arguments), with_gradients(arguments)
    y, a, b, p = torch.ops.xlstm.wkv(*ours, reset=reset)
    y_loop, a_loop, b_loop = wkv_loop(*loop, reset=reset)
    torch.testing.assert_close(y, y_loop, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(a * p.exp(), a_loop, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(b * p.exp(), b_loop, rtol=1e-10, atol=1e-11)
    gy, ga, gb = torch.randn_like(y), torch.randn_like(a), torch.randn_like(b)
    unit = p.detach().exp()  # gradients of a, b count in units of e^p
    torch.autograd.backward([y, a, b], [gy, ga * unit, gb * unit])
    torch.autograd.backward([y_loop, a_loop, b_loop], [gy, ga, gb])
    for name, mine, other in zip(WKV_NAMES, ours, loop):
        if mine is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("batch, time, dim, n", [(1, 1, 1, 1), (2, 7, 5, 3), (3, 33, 17, 16), (2, 9, 200, 4)])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_selective_scan_is_its_definition(batch, time, dim, n, states, with_reset):
    arguments = scan_arguments(batch, time, dim, n, states)
    reset = resets(batch, time) if with_reset else None
    ours, loop = with_gradients(arguments), with_gradients(arguments)
    out, out_loop = torch.ops.xlstm.selective_scan(*ours, reset=reset), scan_loop(*loop, reset=reset)
    gradients = [torch.randn_like(t) for t in out]
    torch.autograd.backward(out, gradients)
    torch.autograd.backward(out_loop, gradients)
    for mine, other in zip(out, out_loop):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)
    for mine, other in zip(ours, loop):
        if mine is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["wkv", "selective_scan"])
def test_operators_keep_torchs_contract(name):
    arguments = wkv_arguments(2, 5, 6, True) if name == "wkv" else scan_arguments(2, 5, 6, 3, True)
    operator = getattr(torch.ops.xlstm, name)
    torch.library.opcheck(operator.default, with_gradients(arguments), {"reset": resets(2, 5)})
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = [t if t is None else t.to(dtype) for t in arguments[:-3 if name == "wkv" else -1]]
        exact = operator(*[t.double() for t in low])[0]
        got = operator(*low)[0]
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= tolerance * exact.norm()
    with pytest.raises(RuntimeError, match=name):
        operator(*[arguments[0][0], *arguments[1:]])


@pytest.mark.parametrize("name", ["wkv", "selective_scan"])
def test_the_inputs_alone_are_saved(name):
    """On every device: states of tokens are computed again in the backward pass."""
    arguments = with_gradients(wkv_arguments(2, 100, 6, True) if name == "wkv" else scan_arguments(2, 100, 6, 16, True))
    reset, saved = resets(2, 100), []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = getattr(torch.ops.xlstm, name)(*arguments, reset=reset)
    given = {t.data_ptr() for t in [*arguments, reset]}
    assert {t.data_ptr() for t in saved} == given
    first = torch.autograd.grad(out[0].sum(), arguments[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{name}_backward"):  # no second derivative
        torch.autograd.grad(first.sum(), arguments[0])


def model(kind, vocab, dim, blocks, heads, extra=""):
    yaml = f"model: {{kind: {kind}, vocab_size: {vocab}, embedding_dim: {dim}, num_blocks: {blocks}, num_heads: {heads}{extra}}}"
    ours = libxlstm.make_model(yaml)
    ours.train(False)
    return ours


def copy_weights(ours, theirs, names):
    """names: ours -> theirs; every parameter of ours must be named."""
    parameters = dict(ours.named_parameters())
    state = theirs.state_dict()
    assert set(parameters) == set(names), set(parameters) ^ set(names)
    with torch.no_grad():
        for mine, other in names.items():
            parameters[mine].copy_(state[other].reshape(parameters[mine].shape))


def compare(ours, theirs, vocab, **options):
    ids = torch.randint(vocab, (2, 11))
    with torch.no_grad():
        expected = theirs(ids, **options).logits
        got, state = ours(ids)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
        first, middle = ours(ids[:, :6])
        second = ours(ids[:, 6:], middle)[0]
        torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=2e-4, atol=2e-4)


def randomise(theirs):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs.eval()


def test_llama_is_transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False)))
    ours = model("llama", 31, 32, 2, 4, ", feed_forward: {proj_factor: 2.6666666666666665}")
    names = {"embedding.weight": "model.embed_tokens.weight", "out_norm.weight": "model.norm.weight",
             "lm_head.weight": "lm_head.weight"}
    parts = {"norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.q": "self_attn.q_proj",
             "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
             "ffn.proj_up_gate": "mlp.gate_proj", "ffn.proj_up": "mlp.up_proj", "ffn.proj_down": "mlp.down_proj"}
    for i in range(2):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in parts.items()}
    copy_weights(ours, theirs, names)
    compare(ours, theirs, 31)


def test_mamba_is_transformers_mamba():
    from transformers import MambaConfig, MambaForCausalLM

    theirs = randomise(MambaForCausalLM(MambaConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, state_size=16, conv_kernel=4, time_step_rank=2,
        layer_norm_epsilon=1e-5, tie_word_embeddings=False)))
    ours = model("mamba", 31, 32, 2, 1)
    names = {"embedding.weight": "backbone.embeddings.weight", "out_norm.weight": "backbone.norm_f.weight",
             "lm_head.weight": "lm_head.weight"}
    parts = {"norm.weight": "norm.weight", "in_proj.weight": "mixer.in_proj.weight", "conv.weight": "mixer.conv1d.weight",
             "conv.bias": "mixer.conv1d.bias", "x_proj.weight": "mixer.x_proj.weight",
             "dt_proj.weight": "mixer.dt_proj.weight", "dt_proj.bias": "mixer.dt_proj.bias", "a_log": "mixer.A_log",
             "skip": "mixer.D", "out_proj.weight": "mixer.out_proj.weight"}
    for i in range(2):
        names |= {f"blocks.{i}.{a}": f"backbone.layers.{i}.{b}" for a, b in parts.items()}
    copy_weights(ours, theirs, names)
    compare(ours, theirs, 31, use_cache=False)


def test_gpt_is_transformers_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = randomise(GPT2LMHeadModel(GPT2Config(
        vocab_size=31, n_positions=64, n_embd=32, n_layer=2, n_head=4, activation_function="gelu", resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, layer_norm_epsilon=1e-5)))
    ours = model("gpt", 31, 32, 2, 4, ", tie_weights: true, max_positions: 64, "
                 "feed_forward: {proj_factor: 4, round_up_to_multiple_of: 1}")
    state = theirs.state_dict()
    parameters = dict(ours.named_parameters())
    filled = set()

    def put(name, value):
        with torch.no_grad():
            parameters[name].copy_(value)
        filled.add(name)

    put("embedding.weight", state["transformer.wte.weight"])
    put("position_embedding.weight", state["transformer.wpe.weight"])
    for part in ("weight", "bias"):
        put(f"out_norm.{part}", state[f"transformer.ln_f.{part}"])
    for i in range(2):
        theirs_of = lambda name: state[f"transformer.h.{i}.{name}"]  # noqa: E731, B023
        for part in ("weight", "bias"):
            put(f"blocks.{i}.norm.{part}", theirs_of(f"ln_1.{part}"))
            put(f"blocks.{i}.ffn_norm.{part}", theirs_of(f"ln_2.{part}"))
            for j, name in enumerate("qkv"):  # its matrices stand transposed
                whole = theirs_of(f"attn.c_attn.{part}")
                put(f"blocks.{i}.attention.{name}.{part}", (whole.t() if whole.dim() == 2 else whole)[32 * j:32 * (j + 1)])
            for mine, other in (("attention.out", "attn.c_proj"), ("ffn.proj_up", "mlp.c_fc"), ("ffn.proj_down", "mlp.c_proj")):
                value = theirs_of(f"{other}.{part}")
                put(f"blocks.{i}.{mine}.{part}", value.t() if value.dim() == 2 else value)
    assert filled == set(parameters)
    compare(ours, theirs, 31)


def test_rwkv4_is_transformers_rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    theirs = randomise(RwkvForCausalLM(RwkvConfig(
        vocab_size=31, context_length=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
        intermediate_size=128, layer_norm_epsilon=1e-5, rescale_every=0, tie_word_embeddings=False)))
    ours = model("rwkv4", 31, 32, 2, 1)
    names = {"embedding.weight": "rwkv.embeddings.weight", "lm_head.weight": "head.weight"}
    names |= {f"in_norm.{p}": f"rwkv.blocks.0.pre_ln.{p}" for p in ("weight", "bias")}
    names |= {f"out_norm.{p}": f"rwkv.ln_out.{p}" for p in ("weight", "bias")}
    parts = {"mix_k": "attention.time_mix_key", "mix_v": "attention.time_mix_value", "mix_r": "attention.time_mix_receptance",
             "decay": "attention.time_decay", "first": "attention.time_first", "key.weight": "attention.key.weight",
             "value.weight": "attention.value.weight", "receptance.weight": "attention.receptance.weight",
             "output.weight": "attention.output.weight", "ffn_mix_k": "feed_forward.time_mix_key",
             "ffn_mix_r": "feed_forward.time_mix_receptance", "ffn_key.weight": "feed_forward.key.weight",
             "ffn_value.weight": "feed_forward.value.weight", "ffn_receptance.weight": "feed_forward.receptance.weight"}
    for p in ("weight", "bias"):
        parts |= {f"norm.{p}": f"ln1.{p}", f"ffn_norm.{p}": f"ln2.{p}"}
    for i in range(2):
        names |= {f"blocks.{i}.{a}": f"rwkv.blocks.{i}.{b}" for a, b in parts.items()}
    copy_weights(ours, theirs, names)
    compare(ours, theirs, 31, use_cache=False)


def test_stacked_lstm_is_torchs():
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(24, 24, num_layers=2, batch_first=True)
    ours = model("lstm", 31, 24, 2, 1, ", add_out_norm: false")
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for layer in range(2):
            for mine, other in (("weight_ih", "weight_ih"), ("weight_hh", "weight_hh"), ("bias_ih", "bias_ih"),
                                ("bias_hh", "bias_hh")):
                parameters[f"blocks.{layer}.lstm.{mine}"].copy_(getattr(theirs, f"{other}_l{layer}"))
        ids = torch.randint(31, (3, 9))
        expected = theirs(parameters["embedding.weight"][ids])[0] @ parameters["lm_head.weight"].t()
        torch.testing.assert_close(ours(ids)[0], expected, rtol=1e-5, atol=1e-5)
