"""What gpu_slstm.py times: sizes, their work, inputs, the float64 reference, the figure."""

from dataclasses import dataclass

import torch

from gpu_cases import OURS, set_count

HEADS = [(48, 16), (24, 32), (12, 64), (6, 128), (3, 256), (1, 768)]  # NH, DH: 768 units in all
SUITES = ("heads", "batches", "times", "blocks")


@dataclass(frozen=True)
class Case:
    suite: str
    batch: int
    time: int
    heads: int
    dh: int

    def title(self):
        return f"B={self.batch} T={self.time} NH={self.heads} DH={self.dh}"


def cases(suites, tiny):
    if tiny:
        every = [Case("heads", 2, 8, 2, 16), Case("heads", 2, 8, 1, 16), Case("batches", 3, 8, 2, 16)]
    else:
        every = [Case("heads", 16, 1024, *heads) for heads in HEADS]
        every += [Case("blocks", 16, 2048, 4, dh) for dh in (192, 256, 384, 512)]
        every += [Case("batches", 2**n, 1024, *heads) for heads in ((12, 64), (1, 768)) for n in range(1, 9)]
        every += [Case("times", 16, t, *heads) for heads in ((12, 64), (1, 768)) for t in (256, 512, 1024, 2048)]
    chosen = {}
    for case in every:
        if case.suite in suites:
            chosen.setdefault((case.batch, case.time, case.heads, case.dh), case)
    return list(chosen.values())


def work(case):
    """FLOP of the recurrent products: forward R y; backward R^T dg and the gradient of R."""
    product = 2 * 4 * case.batch * case.time * case.heads * case.dh**2
    return {"forward": product, "backward": 2 * product, "both": 3 * product}


# ---- inputs and reference ------------------------------------------------------------------------------------------


def make_inputs(case, kind, dtype, device, seed):
    """Leaves wx, r, b, or for kind "layer" x, weight, r, b of one dense head, and a gradient of y."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes, scale=1.0):
        return (scale * torch.randn(*sizes, generator=generator, device=device)).to(dtype)

    batch, time, heads, dh = case.batch, case.time, case.heads, case.dh
    parameters = [draw(4, heads, dh, dh, scale=0.6 * dh**-0.5), draw(4, heads, dh)]
    first = [draw(batch, time, dh), draw(4 * dh, dh, scale=dh**-0.5)] if kind == "layer" else [draw(batch, time, 4, heads, dh)]
    return [x.requires_grad_() for x in first + parameters], draw(batch, time, heads, dh)


def input_sets(case, kind, dtype, device):
    first = make_inputs(case, kind, dtype, device, seed=0)
    size = sum(x.numel() * x.element_size() for x in first[0])
    return [first] + [make_inputs(case, kind, dtype, device, seed=n) for n in range(1, set_count(size, device))]


def reference(tensors, kind):
    """y by the recurrence in float64; "layer" is an LSTM that computes wx = weight x itself."""
    tensors = [x.double() for x in tensors]
    if kind == "layer":
        x, weight, *tensors = tensors
        dh = x.shape[-1]
        tensors.insert(0, (x @ weight.T).view(*x.shape[:2], 4, 1, dh))
    wx, r, b = tensors
    y = c = n = torch.zeros_like(wx[:, 0, 0])
    m = torch.full_like(y, float("-inf"))
    outputs = []
    for t in range(wx.shape[1]):
        i, f, z, o = (wx[:, t] + torch.einsum("ghoi,bhi->bgho", r, y) + b).unbind(1)
        z, o = torch.tanh(z), torch.sigmoid(o)
        if kind == "slstm":
            log_f = torch.nn.functional.logsigmoid(f) + m
            m = torch.maximum(log_f, i).detach()
            keep, take = torch.exp(log_f - m), torch.exp(i - m)
            c, n = keep * c + take * z, keep * n + take
            y = o * c / n
        else:
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * z
            y = o * torch.tanh(c)
        outputs.append(y)
    return torch.stack(outputs, 1)


# ---- figure --------------------------------------------------------------------------------------------------------


def plot(report, path):
    """False where matplotlib is missing or nothing was timed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of = {"heads": "dh", "blocks": "dh", "batches": "batch", "times": "time"}
    suites = [s for s in SUITES if any(row["case"]["suite"] == s for row in report["cases"])]
    if not suites:
        return False
    figure, axes = pyplot.subplots(1, len(suites), figsize=(1 + 4.2 * len(suites), 4.2), squeeze=False)
    for axis, suite in zip(axes[0], suites):
        lines = {}
        for row in report["cases"]:
            if row["case"]["suite"] != suite:
                continue
            for name, result in row["times"].items():
                if "both" in result:
                    label = name if suite in ("heads", "blocks") else f"{name}, DH {row['case']['dh']}"
                    lines.setdefault(label, []).append((row["case"][axes_of[suite]], result["both"]["step_us"]))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points)), marker="o", markersize=3, label=name, linewidth=2 if name.startswith(OURS) else 1)
        axis.set(xscale="log", yscale="log", xlabel=axes_of[suite], title=suite)
        axis.set_ylabel("forward + backward, median us per time step")
        if lines:
            axis.legend(fontsize=6)
    info = report["machine"]
    figure.suptitle(f"{info['device']}, torch {info['torch']}, {info['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return True
