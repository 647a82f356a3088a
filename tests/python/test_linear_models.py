"""Linear attention, RetNet, GLA, HGRN, HGRN2, H3, Hyena against their equations token by token; RWKV-5 and RWKV-6 against
the rwkv package."""

import os

import pytest
import torch
import torch.nn.functional as F

import libxlstm

VOCABULARY, DIM, BLOCKS, HEADS = 31, 32, 2, 4
EPS = 1e-2  # so large that a place where it is missing shows; of the models by equations


def model(kind, extra=""):
    ours = libxlstm.make_model(f"model: {{kind: {kind}, vocab_size: {VOCABULARY}, embedding_dim: {DIM}, "
                                  f"num_blocks: {BLOCKS}, num_heads: {HEADS}{extra}}}")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours.train(False)
    return ours


class Weights:
    """Parameters by name below a prefix, in float64."""

    def __init__(self, ours, prefix=""):
        self.ours, self.prefix = ours, prefix

    def __getitem__(self, name):
        return dict(self.ours.named_parameters())[self.prefix + name].detach().double()

    def below(self, name):
        return Weights(self.ours, self.prefix + name + ".")

    def linear(self, name, x):
        return x @ self[name + ".weight"].t()


def rms(x, weight, eps=EPS):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def by_head(x):
    return x.unflatten(-1, (HEADS, -1))


def recurrence(q, k, v, decay, scale):
    """S = diag(decay) S + k v^T, y = S^T q; decay (B,T,NH,DK) as a factor."""
    s = q.new_zeros(q.shape[0], HEADS, q.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        s = decay[:, t, :, :, None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, s))
    return torch.stack(out, 1)


def linear_attention(w, x, bound):
    q, k, v = (by_head(w.linear(name, x)) for name in "qkv")
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril()
    return w.linear("out", (torch.einsum("bhts,bshd->bthd", weights, v)
                            / (weights.sum(-1).transpose(1, 2)[..., None] + EPS)).flatten(2))


def retnet(w, x, bound):
    q, k, v = (by_head(w.linear(name, x)) for name in "qkv")
    half = q.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] / 1e4 ** (torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    rotate = lambda t: (lambda z: torch.cat([z.real, z.imag], -1))(torch.complex(*t.chunk(2, -1)) * turn)  # noqa: E731
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
    h = recurrence(rotate(q), rotate(k), v, gamma[:, None].expand(q.shape), q.shape[-1] ** -0.5)
    return w.linear("out", F.layer_norm(h, h.shape[-1:], eps=EPS).flatten(2) * F.silu(w.linear("gate", x)))


def gla(w, x, bound):
    q, k, v = (by_head(w.linear(name, x)) for name in "qkv")
    decay = torch.sigmoid(w.linear("decay_up", w.linear("decay_down", x)) + w["decay_up.bias"]) ** (1 / 16)
    h = recurrence(q, k, v, by_head(decay), q.shape[-1] ** -0.5)
    return w.linear("out", rms(h, w["head_norm.weight"]).flatten(2) * F.silu(w.linear("gate", x)))


def hgrn(w, x, bound):
    forget = bound + (1 - bound) * torch.sigmoid(w.linear("forget", x))
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = forget[:, t] * state + (1 - forget[:, t]) * F.silu(w.linear("input", x[:, t]))
        rows.append(state)
    return w.linear("out", rms(torch.stack(rows, 1), w["out_norm.weight"]) * F.silu(w.linear("gate", x)))


def hgrn2(w, x, bound):
    forget = bound + (1 - bound) * torch.sigmoid(w.linear("forget", x))
    h = recurrence(by_head(F.silu(w.linear("query", x))), by_head(1 - forget), by_head(w.linear("input", x)),
                   by_head(forget), 1)
    return w.linear("out", rms(h.flatten(2), w["out_norm.weight"]))


def h3(w, x, bound):
    q, k, v = (w.linear(name, x) for name in "qkv")
    taps, length = w["shift.taps"], x.shape[1]
    k = w["shift.skip"] * k + torch.stack([sum(taps[:, j] * k[:, t - j] for j in range(min(t + 1, taps.shape[1])))
                                           for t in range(length)], 1)
    kv = by_head(k)[..., :, None] * by_head(v)[..., None, :]  # (B,T,NH,DH,DH)
    step = w["diagonal.log_step"].exp()[:, None]
    a = step / 2 * torch.complex(-w["diagonal.log_decay"].exp(), w["diagonal.frequency"])
    b, c = (torch.view_as_complex(w[f"diagonal.{name}"]) for name in ("input", "output"))
    a, b = ((1 + a) / (1 - a))[:, None, None], (step * b / (1 - a))[:, None, None]
    state, rows = 0, []
    for t in range(length):
        state = a * state + b * kv[:, t, ..., None]
        out = 2 * (c[:, None, None] * state).sum(-1).real + w["diagonal.skip"][:, None, None] * kv[:, t]
        rows.append(torch.einsum("bhij,bhi->bhj", out, by_head(q)[:, t]).flatten(1))
    return w.linear("out", torch.stack(rows, 1))


def hyena(w, x, bound):
    length, inner = x.shape[1], w.linear("in", x)
    short = F.conv1d(F.pad(inner.transpose(1, 2), (2, 0)), w["conv_weight"][:, None], w["conv_bias"], groups=3 * DIM)
    x1, x2, v = short.transpose(1, 2).chunk(3, -1)
    time = torch.arange(length, dtype=torch.float64)[:, None] / 2048
    angle = 2 * torch.pi * time * torch.linspace(1e-4, 15, 16, dtype=torch.float64)
    row = torch.cat([time, angle.cos(), -angle.sin()], 1)
    for name in ("features", "inner0", "inner1"):
        row = torch.sin(w["filter.frequency"] * (w.linear(f"filter.{name}", row) + w[f"filter.{name}.bias"]))
    full = -torch.tensor(0.01, dtype=torch.float64).log().item()
    delta = torch.linspace(full / 1.5, full / 0.3, DIM, dtype=torch.float64)
    kernel = w.linear("filter.channels", row) * torch.exp(-delta * time)
    z = x2 * v
    y = torch.stack([sum(kernel[t - s] * z[:, s] for s in range(t + 1)) for t in range(length)], 1)
    return w.linear("out", x1 * (y + w["skip"] * z))


def reference(ours, mixer, ids):
    w = Weights(ours)
    share = torch.zeros(BLOCKS, DIM, dtype=torch.float64)
    if "lower_bounds.logits" in dict(ours.named_parameters()):
        share = torch.softmax(w["lower_bounds.logits"], 0)
    x = w["embedding.weight"][ids]
    for i in range(BLOCKS):
        block = w.below(f"blocks.{i}")
        x = x + mixer(block.below("mixer"), rms(x, block["norm.weight"]), share[1:i + 1].sum(0))
        y = rms(x, block["ffn_norm.weight"])
        x = x + block.linear("ffn.proj_down", F.silu(block.linear("ffn.proj_up_gate", y)) * block.linear("ffn.proj_up", y))
    return w.linear("lm_head", rms(x, w["out_norm.weight"]))


def check_logits(ours, ids, expected):
    with torch.no_grad():
        whole, _ = ours(ids)
        torch.testing.assert_close(whole.double(), expected, rtol=2e-4, atol=2e-4)
        state, rows = None, []
        for t in range(ids.shape[1]):  # as generation does
            logits, state = ours(ids[:, t:t + 1], state) if state is not None else ours(ids[:, :1])
            rows.append(logits)
        torch.testing.assert_close(torch.cat(rows, 1).double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mixer", [linear_attention, retnet, gla, hgrn, hgrn2, h3, hyena])
def test_linear_attention_models_are_their_equations(mixer):
    ours = model(mixer.__name__, f", norm_eps: {EPS}, feed_forward: {{proj_factor: 2.0}}")
    ids = torch.randint(VOCABULARY, (2, 37))
    check_logits(ours, ids, reference(ours, mixer, ids))


ATTENTION = {"key.weight": "key.weight", "value.weight": "value.weight", "receptance.weight": "receptance.weight",
             "gate.weight": "gate.weight", "output.weight": "output.weight", "head_norm.weight": "ln_x.weight",
             "head_norm.bias": "ln_x.bias", "decay": "time_decay", "first": "time_faaaa"}
MIXES = {"key": "k", "value": "v", "receptance": "r", "gate": "g"}


def rwkv_names(version):
    """Ours -> the package's, below one block."""
    mix = "time_mix_" if version == 5 else "time_maa_"
    names = {a: "att." + b for a, b in ATTENTION.items()}
    names |= {f"mix.{a}": f"att.{mix}{b}" for a, b in MIXES.items()}
    if version == 6:
        names |= {"mix.x": "att.time_maa_x", "mix.decay": "att.time_maa_w", "mix.down.weight": "att.time_maa_w1",
                  "mix.up": "att.time_maa_w2", "decay_down.weight": "att.time_decay_w1",
                  "decay_up.weight": "att.time_decay_w2"}
    names |= {"ffn_mix_k": f"ffn.{mix}k", "ffn_mix_r": f"ffn.{mix}r", "ffn_key.weight": "ffn.key.weight",
              "ffn_value.weight": "ffn.value.weight", "ffn_receptance.weight": "ffn.receptance.weight"}
    return names | {f"{a}.{p}": f"{b}.{p}" for a, b in (("norm", "ln1"), ("ffn_norm", "ln2")) for p in ("weight", "bias")}


@pytest.mark.parametrize("version", [5, 6])
def test_rwkv_is_the_packages(version, tmp_path, monkeypatch):
    for name in ("RWKV_JIT_ON", "RWKV_CUDA_ON"):
        monkeypatch.setitem(os.environ, name, "0")
    from rwkv.model import RWKV

    ours = model(f"rwkv{version}")
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    names = {"embedding.weight": "emb.weight", "lm_head.weight": "head.weight"}
    names |= {f"{a}.{p}": f"{b}.{p}" for a, b in (("in_norm", "blocks.0.ln0"), ("out_norm", "ln_out")) for p in ("weight", "bias")}
    for i in range(BLOCKS):
        names |= {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in rwkv_names(version).items()}
    assert set(names) == set(parameters)
    theirs = {}
    for mine, other in sorted(names.items(), key=lambda item: "ln_x" not in item[1]):  # it knows its version by the order
        value = parameters[mine].clone()
        if other.endswith(("_w1", "_w2")) and value.dim() == 2:
            value = value.t().contiguous()
        if other.endswith(("time_decay", "time_faaaa")):
            value = value.view(HEADS, -1)
        theirs[other] = value
    torch.save(theirs, tmp_path / "weights.pth")
    package = RWKV(str(tmp_path / "weights.pth"), "cpu fp32", verbose=False)
    assert int(package.version) == version
    ids = torch.randint(VOCABULARY, (2, 19))
    expected = [package.forward(row.tolist(), None, full_output=True)[0] for row in ids]
    check_logits(ours, ids, torch.stack(expected).double())
