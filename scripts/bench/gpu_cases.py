"""What gpu_mlstm.py times: sizes, their work, inputs, the float64 reference, the figure."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

OURS = "libxlstm"
NAMES = ["q", "k", "v", "igate", "fgate"]
TOKENS = 65536
HEADS = [(64, 64, 64), (32, 128, 128), (16, 128, 256), (8, 256, 512), (4, 512, 1024)]  # NH, DQK, DV
STANDARD = [(16, 128, 256), (8, 256, 512)]


@dataclass(frozen=True)
class Case:
    suite: str
    batch: int
    time: int
    heads: int
    dqk: int
    dv: int

    def title(self):
        return f"B={self.batch} T={self.time} NH={self.heads} DQK={self.dqk} DV={self.dv}"


def cases(suites, tiny):
    if tiny:
        every = [Case("standard", 2, 64, 2, 16, 32), Case("tokens", 1, 128, 2, 16, 16)]
    else:
        every = [Case("standard", TOKENS // 8192, 8192, *heads) for heads in STANDARD]
        every += [Case("tokens", TOKENS // t, t, *heads) for heads in HEADS for t in [2**n for n in range(9, 17)]]
        every += [Case("blocks", TOKENS // 2048, 2048, 4, dim, dim) for dim in (384, 512, 768, 1024)]
        every += [Case("small", 1, t, *heads) for heads in STANDARD for t in (1024, 8192, 65536, 262144)]
    chosen = {}
    for case in every:
        if case.suite in suites:
            chosen.setdefault((case.batch, case.time, case.heads, case.dqk, case.dv), case)
    return list(chosen.values())


def work(case):
    """(forward, backward) as (FLOP, bytes) of bfloat16 calls: the chunkwise form with chunks of 128 tokens, in which a
    row meets 96 keys of its chunk on average. Scores are computed once per 128 columns of the output."""
    keys, a, x = 96, case.dqk, case.dv

    def sweep(contraction, columns):
        return (4 * contraction * columns + 2 * keys * contraction * -(-columns // 128) + 2 * keys * columns,
                4 * contraction + 4 * columns)

    count = case.batch * case.time * case.heads
    forward, dv, dqk = sweep(a, x), sweep(a, x), sweep(x, a)
    backward = (dv[0] + 2 * dqk[0], dv[1] + 2 * dqk[1] + 2 * a)
    return tuple((count * flop, count * size) for flop, size in (forward, backward))


# ---- inputs and reference ------------------------------------------------------------------------------------------


def set_count(size, device):
    """Enough input sets that together they exceed the L2 cache; at least three, at most 32."""
    if device.type != "cuda":
        return 3
    return max(3, min(32, int(4 * torch.cuda.get_device_properties(device).L2_cache_size / size) + 1))


def make_inputs(case, operator, dtype, device, gates, seed):
    """Leaves q, k, v, igate, fgate in the operator's layout and a gradient of h; gates are float32."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, dqk, dv = operator.shape or (case.heads, case.dqk, case.dv)
    mean = 3.0 if gates == "open" else 0.0

    def draw(*width, kind=dtype, shift=0.0):
        sizes = (case.batch, heads, case.time) if operator.heads_first else (case.batch, case.time, heads)
        return (torch.randn(*sizes, *width, generator=generator, device=device) + shift).to(kind)

    wide = torch.float32
    tensors = [draw(dqk), draw(dqk), draw(dv), draw(kind=wide, shift=-mean), draw(kind=wide, shift=mean)]
    return [x.requires_grad_() for x in tensors], draw(dv)


def reference(q, k, v, i, f, kind):
    """The parallel form in float64 on (B,T,NH,D) tensors; m carries no gradient."""
    q, k, v, i, f = (x.double().transpose(1, 2) for x in (q, k, v, i, f))
    log_i = {"exp": i, "decay": torch.zeros_like(i)}.get(kind, F.logsigmoid(i))
    total = F.logsigmoid(f).cumsum(-1)
    exponent = total[..., :, None] - total[..., None, :] + log_i[..., None, :]
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    exponent = exponent.masked_fill(future, float("-inf"))
    m = torch.maximum(exponent.amax(-1), total).detach() if kind == "exp" else torch.zeros_like(total)
    weights = (q @ k.mT) * q.shape[-1] ** -0.5 * torch.exp(exponent - m[..., None])
    h = weights @ v
    if kind in ("exp", "sigmoid"):
        h = h / (torch.maximum(weights.sum(-1).abs(), torch.exp(-m)) + 1e-6)[..., None]
    return h.transpose(1, 2)


def relative_error(got, wanted):
    error = (got.detach().double() - wanted.detach()).norm() / wanted.detach().norm()
    return float(error) if torch.isfinite(error) else float("inf")


def step_sets(batch, heads, dqk, dv, dtype, device):
    """Inputs and states of one decoding step; m as (B,NH)."""
    size = 4 * batch * heads * dqk * dv

    def draw(*sizes, kind=torch.float32):
        return torch.randn(batch, heads, *sizes, device=device).to(kind)

    return [([draw(dqk, kind=dtype), draw(dqk, kind=dtype), draw(dv, kind=dtype), draw() - 3, draw() + 3],
             [draw(dqk, dv), draw(dqk), draw()]) for _ in range(set_count(size, device))]


def ring_of(k, v, tokens=16, spread=False):
    """A ring for k (B,NH,DQK) and v (B,NH,DV): empty, or `spread`: as many heads at every fill, so that every lazy step
    folds its share of them."""
    count = torch.zeros(k.shape[:2], dtype=torch.int32, device=k.device)
    if spread:
        count += (torch.arange(count.numel(), device=k.device) * tokens // count.numel()).view(count.shape).to(torch.int32)
    wide = torch.promote_types(k.dtype, torch.float32)
    slots = [k.new_zeros(*k.shape[:2], tokens, width) for width in (k.shape[-1], v.shape[-1])]
    return [*slots, k.new_zeros(*k.shape[:2], tokens, 2, dtype=wide), count]


# ---- figure --------------------------------------------------------------------------------------------------------


def plot(report, path):
    """False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = {}
    for row in report["cases"]:
        case = Case(**row["case"])
        if case.suite in ("tokens", "standard"):
            shapes.setdefault((case.heads, case.dqk, case.dv), {})[case.time] = row["times"]
    steps = report.get("steps", {}).get("cases", [])
    if not shapes and not steps:
        return False
    count = len(shapes) + bool(steps)
    figure, axes = pyplot.subplots(1, count, figsize=(1 + 4.2 * count, 4.2), squeeze=False)
    for axis, ((heads, dqk, dv), by_time) in zip(axes[0], shapes.items()):
        names = list(dict.fromkeys(name for times in by_time.values() for name, r in times.items() if "both" in r))
        for name in names:
            points = sorted((t, times[name]["both"]["median_ms"]) for t, times in by_time.items()
                            if "both" in times.get(name, {}))
            axis.plot(*zip(*points), marker="o", markersize=3, label=name, linewidth=2 if name.startswith(OURS) else 1)
        axis.set(xscale="log", yscale="log", xlabel="T", title=f"NH {heads}, DQK {dqk}, DV {dv}")
        axis.set_ylabel("forward + backward, median ms")
        if names:
            axis.legend(fontsize=6)
    if steps:
        lines = {}
        for row in steps:
            for name, result in row["times"].items():
                if "median_ms" in result:
                    lines.setdefault(f"{name} ({row['dqk']},{row['dv']})", []).append((row["batch"], 1e3 * result["median_ms"]))
        for name, points in lines.items():
            axes[0][-1].plot(*zip(*points), marker="o", markersize=3, label=name)
        axes[0][-1].set(xscale="log", yscale="log", xlabel="B", ylabel="median us", title="decoding step")
        axes[0][-1].legend(fontsize=6)
    info = report["machine"]
    figure.suptitle(f"{info['device']}, torch {info['torch']}, {info['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return True
