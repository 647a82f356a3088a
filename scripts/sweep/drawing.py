"""Figures of an experiment as SVG files; without matplotlib there are none, and table and page come out without them."""

import importlib.util
import io
import sys

from .execution import write_atomically
from .figures import resolve

COLUMNS = 3  # plots side by side
TITLE_LETTERS = 26  # have room over one of them
PALETTE = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd",
           "#2f4b7c", "#a05195", "#f95d6a", "#ffa600", "#003f5c")
MARKERS = "os^Dv<>pPX*hd8H"


def available():
    return importlib.util.find_spec("matplotlib") is not None


def draw(results, folder):
    """Writes <folder>/<figure>.svg for every figure that has a value; returns their paths."""
    found = []
    for name, description in results.experiment.figures.items():
        figure = resolve(results, name, description)
        path = folder / f"{name}.svg"
        path.unlink(missing_ok=True)
        if any(series.points for panel in figure.panels for series in panel.series) and available():
            try:
                write_atomically(path, svg_text(figure))
                found.append(path)
            except Exception as error:  # whatever it is: a picture is no reason to lose the table
                print(f"reproduce: figure {name} could not be drawn: {error}", file=sys.stderr)
    return found


def svg_text(figure):
    """The same bytes for the same figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.size": 8, "axes.titlesize": 9,
                                "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}):
        drawing = _draw(figure, plt)
        out = io.StringIO()
        drawing.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        plt.close(drawing)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _draw(figure, plt):
    count = len(figure.panels)
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    labels = list(dict.fromkeys(series.label for panel in figure.panels for series in panel.series))
    style = {label: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(labels)}
    places = max(len(_categories(panel)) for panel in figure.panels)
    if figure.kind == "heatmap":
        size = (min(14, 2.2 + 0.62 * places) * columns, (1.4 + 0.3 * len(labels)) * rows)
    else:
        bars = places * len(labels) if figure.kind == "bars" else 0
        size = (max(5.6 if columns == 1 else 3.4, min(14, 0.16 * bars)) * columns, 3.0 * rows)
    drawing, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, sharey=figure.kind != "heatmap")
    kinds = {"lines": _lines, "bars": _bars, "heatmap": _heatmap}
    for axis, panel in zip(axes.flat, figure.panels):
        kinds[figure.kind](axis, panel, style, figure)
        axis.set_title(_broken(panel.label) if count > 1 else panel.label, loc="left")
        axis.set_xlabel(figure.x_label)
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    if figure.title:
        drawing.suptitle(figure.title, fontsize=9)
    if figure.kind != "heatmap":
        for axis in axes[:, 0]:
            axis.set_ylabel(figure.y_label)
        _legend(drawing, axes, len(labels))
    drawing.tight_layout(rect=(0, 0, 1, 1))
    return drawing


def _broken(label):
    return label if len(label) <= TITLE_LETTERS else label.replace(", ", ",\n")


def _legend(drawing, axes, count):
    """Beside the last plot, each label once."""
    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    if count > 1 or len(found) > 1:
        axes[0, -1].legend(found.values(), found.keys(), loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)


def _categories(panel):
    return list(dict.fromkeys([point.x for series in panel.series for point in series.points]
                              + [x for series in panel.series for x, _ in series.paper]))


def _whiskers(points):
    return [[p.value - p.low for p in points], [p.high - p.value for p in points]]


def _lines(axis, panel, style, figure):
    for series in panel.series:
        colour, marker = style[series.label]
        x, y = [p.x for p in series.points], [p.value for p in series.points]
        axis.plot(x, y, color=colour, marker=marker, markersize=3.5 if len(x) < 30 else 0, linewidth=1.2, label=series.label)
        if any(p.low < p.high for p in series.points):
            axis.fill_between(x, [p.low for p in series.points], [p.high for p in series.points], color=colour, alpha=0.1,
                              linewidth=0)
        if series.paper:
            axis.plot(*zip(*series.paper), color=colour, marker="x", linestyle=":", linewidth=0.8)
    if any(series.paper for series in panel.series):
        axis.plot([], [], color="#444444", marker="x", linestyle=":", linewidth=0.8, label="paper")
    _scales(axis, figure)
    places = sorted(_categories(panel))
    if "x" in figure.log and len(places) <= 8:
        axis.set_xticks(places, [f"{x:g}" for x in places])
        axis.minorticks_off()
    axis.grid(alpha=0.25, linewidth=0.5)


def _scales(axis, figure):
    if "x" in figure.log:
        axis.set_xscale("log")
    _log_y(axis, figure)


def _log_y(axis, figure):
    """Numbers as they are, also between powers of ten where there are few of these."""
    if "y" in figure.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        from matplotlib.ticker import LogFormatter

        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _bars(axis, panel, style, figure):
    """Groups along x, one bar per series; a paper's value is a cross on it."""
    categories = _categories(panel)
    width = 0.8 / len(panel.series)
    crosses = []
    for i, series in enumerate(panel.series):
        place = {x: c + (i - (len(panel.series) - 1) / 2) * width for c, x in enumerate(categories)}
        points = series.points
        axis.bar([place[p.x] for p in points], [p.value for p in points], width * 0.92, color=style[series.label][0],
                 label=series.label, yerr=_whiskers(points) if any(p.low < p.high for p in points) else None,
                 error_kw={"linewidth": 0.8, "ecolor": "#333333"})
        crosses += [(place[x], value) for x, value in series.paper]
    if crosses:
        axis.plot(*zip(*crosses), "x", color="black", markersize=4, label="paper")
    long = max(len(str(x)) for x in categories) * len(categories) > 60
    axis.set_xticks(range(len(categories)), [str(x) for x in categories], rotation=30 if long else 0,
                    ha="right" if long else "center")
    _log_y(axis, figure)
    axis.grid(axis="y", alpha=0.25, linewidth=0.5)


def _heatmap(axis, panel, style, figure):
    """Rows are series, columns x; every cell with its number."""
    categories = _categories(panel)
    values = [[{p.x: p.value for p in series.points}.get(x, float("nan")) for x in categories] for series in panel.series]
    known = [v for row in values for v in row if v == v]
    low, high = (min([0.0, *known]), 1.0) if max(known, default=0.0) <= 1 else (min(known), max(known))
    image = axis.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            dark = value == value and image.norm(value) < 0.6
            axis.text(c, r, f"{value:.2f}" if value == value else "-", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")
    axis.set_xticks(range(len(categories)), [str(x) for x in categories], rotation=35, ha="right")
    axis.set_yticks(range(len(panel.series)), [series.label for series in panel.series])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
