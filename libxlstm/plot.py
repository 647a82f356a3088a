"""Loss curves of runs: `python -m libxlstm.plot RUN_DIR... [--out FILE]`.

Reads each run's metrics.jsonl and draws training loss (faint: as logged, strong: smoothed), held-out loss and learning
rate. One run is drawn into RUN_DIR/loss.png, several into one picture, loss.png in the current folder, unless --out names
another file.
"""

import argparse
import json
import math
import sys
from pathlib import Path

FORMATS = (".png", ".svg", ".pdf")
SMOOTHING = 0.03  # width of the smoothing window as a share of the logged points


def read_series(run_dir):
    """Metric key -> (steps, values) of a run. A step logged twice counts once, the last time; null is left out, and so
    are lines that are no record of a step, as a crash may tear one."""
    path = Path(run_dir) / "metrics.jsonl"
    series = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                continue
            for key, value in record.items():
                if isinstance(value, (int, float)) and "/" in key and math.isfinite(value):
                    series.setdefault(key, {})[record["step"]] = value
    return {key: tuple(zip(*sorted(points.items()))) for key, points in series.items()}


def smooth(values, width):
    """Centred mean over `width` points, over fewer at the ends, symmetric everywhere so that no end is shifted."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        result.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return result


def loss_limits(series_of_runs):
    """Range of the loss axis: everything but the first steep tenth of each curve decides its top."""
    top, bottom = [], []
    for series in series_of_runs:
        for key in ("train/loss", "val/loss"):
            if key in series:
                values = series[key][1]
                top.append(max(values[len(values) // 10 :]))
                bottom.append(min(values))
    if not top:
        return None
    margin = 0.05 * (max(top) - min(bottom)) or 0.1
    return min(bottom) - margin, max(top) + margin


def draw(runs, out):
    """Draws the runs {name: series} into the file `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, rate_axes) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    for number, (name, series) in enumerate(runs.items()):
        color = f"C{number}"
        if "train/loss" in series:
            steps, values = series["train/loss"]
            loss_axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            width = max(1, round(SMOOTHING * len(values)))
            loss_axes.plot(steps, smooth(values, width), color=color, linewidth=1.6, label=f"{name}: training")
        if "val/loss" in series:
            steps, values = series["val/loss"]
            label = f"{name}: held out, {values[-1]:.3f} at the end"
            if "val/bits_per_byte" in series:
                label += f" ({series['val/bits_per_byte'][1][-1]:.2f} bits per byte)"
            loss_axes.plot(
                steps, values, "o--", color=color, markersize=4, markeredgecolor="white", linewidth=1, label=label
            )
        if "train/lr" in series:
            rate_axes.plot(*series["train/lr"], color=color, linewidth=1.2)
    limits = loss_limits(runs.values())
    if limits is not None:
        loss_axes.set_ylim(*limits)
    loss_axes.set_ylabel("loss (nats per token)")
    if loss_axes.get_legend_handles_labels()[0]:
        loss_axes.legend(frameon=False, fontsize=9)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_xlabel("step")
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = Path(out).with_name("." + Path(out).name + ".tmp")
    try:
        figure.savefig(temporary, dpi=150, format=Path(out).suffix.lstrip("."))
    finally:
        plt.close(figure)
    temporary.replace(out)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m libxlstm.plot", description="Draws the loss curves of runs from their metrics.jsonl."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run; several share one picture")
    place = "loss.png, in the run's folder, or of several runs in the current folder"
    parser.add_argument("--out", metavar="FILE", help=f"picture ({', '.join(FORMATS)}); default: {place}")
    options = parser.parse_args(arguments)
    if options.out and Path(options.out).suffix not in FORMATS:
        parser.error(f"--out {options.out}: expected a name that ends in {', '.join(FORMATS)}")
    runs = {}
    for run in options.runs:
        try:
            series = read_series(run)
        except OSError as error:
            sys.exit(f"libxlstm.plot: error: {error.filename}: {error.strerror}; give the folder of a run")
        if "train/loss" not in series and "val/loss" not in series:
            sys.exit(f"libxlstm.plot: error: {run}/metrics.jsonl holds no loss yet")
        name = Path(run).resolve().name
        runs[name if name not in runs else str(run)] = series
    out = options.out or (Path(options.runs[0]) / "loss.png" if len(runs) == 1 else Path("loss.png"))
    try:
        draw(runs, out)
    except ImportError as error:
        sys.exit(f"libxlstm.plot: error: {error}; pip install matplotlib")
    except OSError as error:
        sys.exit(f"libxlstm.plot: error: {out}: {error.strerror}; name another file with --out")
    print(out)


if __name__ == "__main__":
    main()
