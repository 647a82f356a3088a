"""The peers of the benchmarks, each called through its own public interface. Nothing of theirs is contained here."""

import importlib.metadata

import torch

PACKAGES = ["libxlstm", "xlstm", "mlstm_kernels", "flashrnn", "transformers"]


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

    model = libxlstm._C.make_model(
        f"model: {{vocab_size: {vocab}, embedding_dim: {dim}, num_blocks: {blocks}, num_heads: 4, slstm_at: {slstm_at}}}")
    optimizer = torch.optim.AdamW([p for p in model.parameters().values()], lr=1e-3, fused=True)
    return _step(model, optimizer, lambda: model.loss(ids, targets))


def xlstm_training_step(vocab, dim, blocks, slstm_at, ids, targets):
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    slstm_layer = sLSTMLayerConfig(backend="vanilla", num_heads=4, conv1d_kernel_size=4, dtype="float32",
                                   dtype_w="float32", dtype_r="float32", dtype_s="float32", dtype_b="float32",
                                   dtype_g="float32", dtype_a="float32")
    model = xLSTMLMModel(
        xLSTMLMModelConfig(
            vocab_size=vocab,
            embedding_dim=dim,
            num_blocks=blocks,
            context_length=ids.shape[1],
            slstm_at=slstm_at,
            mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=4)),
            slstm_block=sLSTMBlockConfig(slstm=slstm_layer, feedforward=FeedForwardConfig(proj_factor=1.3)),
        ))
    model.reset_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return _step(model, optimizer,
                 lambda: torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()))
