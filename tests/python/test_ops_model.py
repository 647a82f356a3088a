"""torch.ops.xlstm inside a model written in Python."""

import pytest
import torch

import libxlstm  # noqa: F401  registers torch.ops.xlstm


class OpsBlock(torch.nn.Module):
    """An mLSTM block and an sLSTM block in one, from the operators alone."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        parameter = lambda *shape: torch.nn.Parameter(torch.randn(shape) * 0.2)  # noqa: E731
        self.norm, self.out_norm = parameter(dim), parameter(dim)
        self.conv, self.conv_bias = parameter(dim, 4), parameter(dim)
        self.q, self.k, self.v = (parameter(dim // 4, 4, 4) for _ in range(3))
        self.gates, self.skip, self.z = parameter(2 * heads, dim), parameter(dim), parameter(dim, dim)
        size = dim // heads
        self.wx, self.r, self.b = parameter(4 * dim, dim), parameter(4, heads, size, size), parameter(4, heads, size)

    def forward(self, x, reset):
        ops = torch.ops.xlstm
        batch, length, dim = x.shape
        u = ops.headwise_norm(x.unsqueeze(-2), self.norm)
        a, _ = ops.causal_conv1d(u, self.conv, self.conv_bias, reset=reset, silu=True)
        q, k, v = (ops.block_linear(s, w).view(batch, length, self.heads, -1) for s, w in ((a, self.q), (a, self.k), (u, self.v)))
        i, f = torch.nn.functional.linear(a, self.gates).chunk(2, -1)
        h, *_ = ops.mlstm_chunkwise(q, k, v, i, f, reset=reset)
        x = x + ops.headwise_norm(h, self.out_norm, None, a, self.skip, torch.nn.functional.linear(u, self.z))
        wx = torch.nn.functional.linear(x, self.wx).view(batch, length, 4, self.heads, -1)
        y, *_ = ops.slstm(wx, self.r, self.b, reset=reset)
        return x + y.flatten(2)


class OpsModel(torch.nn.Module):
    def __init__(self, vocabulary=50, dim=16, heads=2):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, dim)
        self.blocks = torch.nn.ModuleList(OpsBlock(dim, heads) for _ in range(2))
        self.head = torch.nn.Parameter(torch.randn(vocabulary, dim) * 0.2)

    def forward(self, ids, targets, reset):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, reset)
        return torch.ops.xlstm.linear_cross_entropy(x, self.head, targets)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_of_operators_compiles_without_graph_break(dynamic):
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = OpsModel()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    parameters = list(model.parameters())
    for length in (9, 14):
        ids, targets = torch.randint(50, (2, length)), torch.randint(50, (2, length))
        reset = torch.rand(2, length) < 0.2
        expected, loss = model(ids, targets, reset), compiled(ids, targets, reset)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
            torch.testing.assert_close(a, b)
