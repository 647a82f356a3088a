"""The peers of the benchmarks, each called through its own public interface. Nothing of theirs is contained here."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

PACKAGES = ["libxlstm", "xlstm", "mlstm_kernels", "flashrnn", "transformers", "flash-linear-attention", "triton"]


def versions() -> dict:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source tree" if package == "libxlstm" else "absent"
    return found


def mlstm():
    """(name, function(q, k, v, i, f, **options) -> h in (B, NH, T, D) layout, options it takes).

    All three differentiate through autograd, so their gradients are the true ones.
    """
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd

    yield "mlstm_kernels native_autograd", mlstm_chunkwise__native_autograd, {"chunk_size"}

    from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

    yield "xlstm parallel", lambda q, k, v, i, f: parallel_stabilized_simple(q, k, v, i[..., None], f[..., None]), set()

    # transformers runs its own native code only where the xlstm package is absent.
    import transformers.utils

    available, transformers.utils.is_xlstm_available = transformers.utils.is_xlstm_available, lambda: False
    try:
        from transformers.models.xlstm import modeling_xlstm
    finally:
        transformers.utils.is_xlstm_available = available
    native = getattr(modeling_xlstm, "mlstm_chunkwise_native_autograd", None)
    if native is not None:

        def hf(q, k, v, i, f, chunk_size):
            out = native(query=q, key=k, value=v, igate=i, fgate=f, chunk_size=chunk_size)
            return out[0] if isinstance(out, tuple) else out

        yield "transformers native", hf, {"chunk_size"}


def slstm(batch, time, heads, dim):
    """(name, function(wx, r, b) -> y); wx (B,T,4,NH,DH), r (4,NH,DH,DH), b (4,NH,DH)."""
    from flashrnn.flashrnn import flashrnn

    for backend in ("vanilla", "vanilla_fwbw"):

        def run(wx, r, b, backend=backend):
            return flashrnn(wx, r, b, function="slstm", backend=backend, dtype="float32")[0][0]

        yield f"flashrnn {backend}", run

    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    cell = sLSTMCell(
        sLSTMCellConfig(hidden_size=heads * dim, num_heads=heads, backend="vanilla", dtype="float32", dtype_w="float32",
                        dtype_r="float32", dtype_s="float32", dtype_b="float32", dtype_g="float32", dtype_a="float32"))

    def run_xlstm(wx, r, b):
        # Its recurrent kernel and bias are parameters of the cell: the same shapes, differentiated as well.
        y, _ = cell(wx.flatten(2))
        return y + 0 * (r.sum() + b.sum())

    yield "xlstm vanilla", run_xlstm


def _step(model, optimizer, loss_of):
    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return run


def our_training_step(vocab, dim, blocks, slstm_at, ids, targets):
    import libxlstm

    model = libxlstm.make_model(
        f"model: {{vocab_size: {vocab}, embedding_dim: {dim}, num_blocks: {blocks}, num_heads: 4, slstm_at: {slstm_at}}}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return _step(model, optimizer, lambda: model.loss(ids, targets))


def xlstm_model(vocab, dim, blocks, slstm_at, time, device):
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    # On a GPU as the package is by itself: its CUDA code in bfloat16, biases and sums in float32.
    cuda = device.type == "cuda"
    types = {} if cuda else dict.fromkeys(("dtype", *(f"dtype_{part}" for part in "wrsbga")), "float32")
    slstm_layer = sLSTMLayerConfig(backend="cuda" if cuda else "vanilla", num_heads=4, conv1d_kernel_size=4, **types)
    model = xLSTMLMModel(
        xLSTMLMModelConfig(
            vocab_size=vocab,
            embedding_dim=dim,
            num_blocks=blocks,
            context_length=time,
            slstm_at=slstm_at,
            mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=4)),
            slstm_block=sLSTMBlockConfig(slstm=slstm_layer, feedforward=FeedForwardConfig(proj_factor=1.3)),
        ))
    model.reset_parameters()
    return model.to(device)


def xlstm_training_step(vocab, dim, blocks, slstm_at, ids, targets):
    model = xlstm_model(vocab, dim, blocks, slstm_at, ids.shape[1], ids.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return _step(model, optimizer,
                 lambda: torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()))


# ---- GPU -----------------------------------------------------------------------------------------------------------


@dataclass
class Operator:
    """A function of (q, k, v, igate, fgate, **options) -> h beside which ours is timed."""

    name: str
    function: Callable
    kind: str  # what it computes: exp | sigmoid | sigmoid plain (no normaliser) | decay (neither input gate nor normaliser) | attention
    heads_first: bool = True  # tensors (B,NH,T,D), else (B,T,NH,D)
    chunk_sizes: list = field(default_factory=lambda: [None])
    shape: tuple | None = None  # (NH, DQK, DV) where it does not take the case's


def mlstm_operators(device: torch.device) -> tuple[list, dict]:
    """What can be imported here, and why the others cannot: [Operator], {name: reason}."""
    absent = {}
    found = []
    makers = ([_triton_mlstm, _simple_gla, _attention] if device.type == "cuda" else [_native_mlstm])
    for make in makers:
        try:
            found += make()
        except Exception as error:  # a peer that fails to import in whatever way is absent
            absent[make.__name__.lstrip("_")] = f"{type(error).__name__}: {error}"
    return found, absent


def _native_mlstm():
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd as native

    def run(q, k, v, i, f, chunk_size):
        return native(q, k, v, i, f, chunk_size=chunk_size)

    return [Operator("mlstm_kernels native", run, "exp", chunk_sizes=[32, 64])]


def _triton_mlstm():
    from mlstm_kernels.torch import get_mlstm_kernel

    def make(name, **options):
        function = get_mlstm_kernel(f"chunkwise--{name}")
        return lambda q, k, v, i, f, chunk_size: function(
            q, k, v, i, f, chunk_size=chunk_size, autocast_kernel_dtype=q.dtype, **options)

    sizes = [64, 128, 256, 512]
    return [
        Operator("mlstm_kernels xl_chunk", make("triton_xl_chunk"), "exp", chunk_sizes=sizes),
        Operator("mlstm_kernels limit_chunk", make("triton_limit_chunk"), "exp", chunk_sizes=[64]),
        Operator("mlstm_kernels siging", make("triton_xl_chunk_siging", normalize=True), "sigmoid", chunk_sizes=sizes),
        Operator("mlstm_kernels siging, no norm", make("triton_xl_chunk_siging", normalize=False), "sigmoid plain",
                 chunk_sizes=sizes),
    ]


def _simple_gla():
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q, k, v, i, f):
        return chunk_simple_gla(q=q, k=k, v=v, g=F.logsigmoid(f))[0]

    return [Operator("fla simple_gla", run, "decay", heads_first=False)]


def _attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def make(backend):
        def run(q, k, v, i, f):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    return [Operator(f"attention, {name}", make(backend), "attention", shape=(32, 128, 128))
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION))]


def mlstm_steps(device: torch.device) -> tuple[list, dict]:
    """[(name, function(q, k, v, i, f, state, spare))], {name: reason}; state and spare are (c, n, m) with m (B,NH,1)."""
    try:
        if device.type == "cuda":
            from mlstm_kernels.torch.recurrent.triton_step import mlstm_recurrent_step__triton as step

            def run(q, k, v, i, f, state, spare):
                return step(q, k, v, i[..., None], f[..., None], *state, matC_new=spare[0], vecN_new=spare[1],
                            scaM_new=spare[2])[0]

            return [("mlstm_kernels triton step", run)], {}
        from mlstm_kernels.torch.recurrent.native_step import mlstm_recurrent_step__native as native
    except Exception as error:
        return [], {"mlstm_kernels step": f"{type(error).__name__}: {error}"}
    return [("mlstm_kernels native step",
             lambda q, k, v, i, f, state, spare: native(q, k, v, i[..., None], f[..., None], *state)[0])], {}


@dataclass
class Recurrence:
    """A function of (wx, r, b) -> y, for kind "layer" of (x, weight, r, b); sizes as in gpu_slstm_cases.make_inputs."""

    name: str
    function: Callable
    kind: str  # what it computes: slstm | lstm | layer (an LSTM with its input projection)
    capturable: bool = True  # in a CUDA graph


def recurrences(device: torch.device) -> tuple[list, dict]:
    """What can be imported here, and why the others cannot: [Recurrence], {name: reason}."""
    absent, found = {}, [Recurrence("torch LSTM" + " (cuDNN)" * (device.type == "cuda"), _torch_lstm, "layer")]
    backends = ("cuda_fused", "cuda", "triton_fused") if device.type == "cuda" else ("vanilla",)
    try:
        from flashrnn.flashrnn import flashrnn
    except Exception as error:
        return found, {"flashrnn": f"{type(error).__name__}: {error}"}

    def make(backend, cell):
        def run(wx, r, b):
            dtype = str(wx.dtype).removeprefix("torch.")
            return flashrnn(wx, r, b, function=cell, backend=backend, dtype=dtype)[0][0]

        return run

    found += [Recurrence(f"flashrnn {backend}" + ", lstm" * (cell == "lstm"), make(backend, cell), cell, capturable=False)
              for backend in backends for cell in ("slstm", "lstm")]
    return found, absent


def _torch_lstm(x, weight, r, b):
    dh = x.shape[-1]
    state = x.new_zeros(1, x.shape[0], dh)
    parameters = [weight, r.reshape(4 * dh, dh), b.reshape(4 * dh), torch.zeros_like(b).reshape(4 * dh)]
    y, _, _ = torch.lstm(x, (state, state), parameters, True, 1, 0.0, True, False, True)
    return y.unflatten(-1, (1, dh))
