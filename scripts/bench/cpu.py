"""Our operators and a training step on the CPU beside the packages people use today, in one run.

    python scripts/bench/cpu.py [--seconds N] [--only mlstm,slstm,train] [--out FOLDER]

Everything is float32, forward and backward, median over rounds in which the candidates take turns. Peers (from PyPI:
xlstm, mlstm_kernels, flashrnn, transformers) are called as their documentation says, with their best chunk size. Only
peers with true gradients count for the ratio; torch.nn.LSTM is another cell and stands there for orientation.
Writes cpu.json and cpu.png into FOLDER (default scripts/bench/results).
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import peers  # noqa: E402
from timing import machine, race  # noqa: E402

MLSTM_SHAPES = [(1, 4, 2048, 128, 128), (2, 4, 2048, 128, 256), (12, 4, 64, 64, 64)]  # B NH T DQK DV
SLSTM_SHAPES = [(8, 256, 4, 64), (4, 512, 4, 128)]  # B T NH DH
CHUNK_SIZES = [32, 64, 128, 256]
OURS = "libxlstm"


def forward_backward(function, inputs):
    """One call with gradients of every input, from a fixed random gradient of the output."""
    weight = None

    def run():
        nonlocal weight
        out = function(*inputs)
        if weight is None:
            weight = torch.randn_like(out)
        return torch.autograd.grad(out, inputs, weight)

    return run


def mlstm_cases(seconds):
    for batch, heads, time, dqk, dv in MLSTM_SHAPES:
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(*shape).requires_grad_()  # noqa: E731
        # Each package gets its own native layout: nobody pays for a transpose.
        ours = [make(batch, time, heads, dqk), make(batch, time, heads, dqk), make(batch, time, heads, dv),
                make(batch, time, heads), make(batch, time, heads)]
        theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in ours]
        candidates = {OURS: forward_backward(lambda *a: torch.ops.xlstm.mlstm_chunkwise(*a)[0], ours)}
        for name, function, options in peers.mlstm():
            for chunk in [c for c in CHUNK_SIZES if c <= time and time % c == 0] if "chunk_size" in options else [None]:
                if chunk is None and dqk != dv:
                    continue  # the quadratic form of the xlstm package takes square heads only
                extra = {} if chunk is None else {"chunk_size": chunk}
                label = name if chunk is None else f"{name} (chunk {chunk})"
                candidates[label] = forward_backward(lambda *a, f=function, e=extra: f(*a, **e), theirs)
        yield f"mLSTM B={batch} NH={heads} T={time} DQK={dqk} DV={dv}", candidates, seconds


def slstm_cases(seconds):
    for batch, time, heads, dim in SLSTM_SHAPES:
        torch.manual_seed(0)
        wx = torch.randn(batch, time, 4, heads, dim).requires_grad_()
        r = (torch.randn(4, heads, dim, dim) * dim**-0.5).requires_grad_()
        b = torch.randn(4, heads, dim).requires_grad_()
        candidates = {OURS: forward_backward(lambda *a: torch.ops.xlstm.slstm(*a)[0], [wx, r, b])}
        for name, function in peers.slstm(batch, time, heads, dim):
            candidates[name] = forward_backward(function, [wx, r, b])
        lstm = torch.nn.LSTM(heads * dim, heads * dim, batch_first=True)
        x = torch.randn(batch, time, heads * dim, requires_grad=True)
        candidates["torch.nn.LSTM (another cell, dense)"] = forward_backward(
            lambda *a: lstm(a[0])[0], [x, *lstm.parameters()])
        yield f"sLSTM B={batch} T={time} NH={heads} DH={dim}", candidates, seconds


def training_cases(seconds):
    batch, time, vocab, dim, blocks, slstm_at = 8, 256, 256, 256, 8, [1]
    torch.manual_seed(0)
    ids = torch.randint(vocab, (batch, time))
    targets = torch.randint(vocab, (batch, time))
    candidates = {
        OURS: peers.our_training_step(vocab, dim, blocks, slstm_at, ids, targets),
        "xlstm": peers.xlstm_training_step(vocab, dim, blocks, slstm_at, ids, targets),
    }
    yield f"training step xLSTM[7:1] d={dim} blocks={blocks} T={time} batch={batch}", candidates, seconds


def summarise(name, result):
    """The ratio against the best peer that computes the same thing with true gradients."""
    peers_only = {n: r["median_ms"] for n, r in result.items() if n != OURS and "another cell" not in n}
    best = min(peers_only, key=peers_only.get)
    ratio = peers_only[best] / result[OURS]["median_ms"]
    print(f"\n{name}")
    for candidate, numbers in sorted(result.items(), key=lambda item: item[1]["median_ms"]):
        print(f"  {numbers['median_ms']:10.2f} ms  {candidate}")
    print(f"  {ratio:.1f}x the best peer ({best})", flush=True)
    return {"case": name, "times": result, "best_peer": best, "ratio": ratio}


def plot(report, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["cases"]
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 1.1 + 1.7 * len(rows)), squeeze=False)
    for axis, row in zip(axes[:, 0], rows):
        best = {}  # each package once, at its best chunk size
        for name, numbers in row["times"].items():
            package = name.split(" (chunk")[0]
            best[package] = min(best.get(package, float("inf")), numbers["median_ms"])
        names = sorted(best, key=best.get, reverse=True)
        bars = axis.barh(names, [best[n] for n in names], color=["#c44e52" if n == OURS else "#8c9bb0" for n in names])
        axis.bar_label(bars, fmt="%.1f ms", padding=3, fontsize=8)
        axis.set_title(f"{row['case']}: {row['ratio']:.1f}x", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("forward + backward, float32, median ms (shorter is better)", fontsize=8)
    info = report["machine"]
    figure.suptitle(f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, {info['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="time per case (at least 5 rounds)")
    parser.add_argument("--only", default="mlstm,slstm,train", help="comma list of mlstm, slstm, train")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import libxlstm  # noqa: F401  registers torch.ops.xlstm

    groups = {"mlstm": mlstm_cases, "slstm": slstm_cases, "train": training_cases}
    report = {"machine": machine(), "peers": peers.versions(), "cases": []}
    for group in args.only.split(","):
        for name, candidates, seconds in groups[group](args.seconds):
            report["cases"].append(summarise(name, race(candidates, seconds)))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, args.out / "cpu.png")
    print(f"\nwrote {args.out / 'cpu.json'} and cpu.png")


if __name__ == "__main__":
    main()
