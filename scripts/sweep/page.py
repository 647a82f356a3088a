"""report.html: what has been reproduced, as one page that needs nothing but itself."""

import base64
import html
import shutil

from .description import DescriptionError, Experiment, experiment_ids, load
from .execution import write_atomically
from .progress import duration
from .report import CLAIM_HEAD, claim_row, introduction, model_row, notes, table_head, title, write
from .results import Results

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
table { border-collapse: collapse; margin: 0.7rem 0; font-size: 13px; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } td.number { white-space: nowrap; } code { font-size: 12px; }
.yes { color: #1a7f37; } .no { color: #c0262d; font-weight: 600; } .open { color: #8a6100; }
.note { color: #555; font-size: 13px; }
img { max-width: 100%; height: auto; display: block; margin: 0.7rem 0; background: #fff; }
"""
OPEN_TABLES = 4
VERDICTS = {True: ("yes", "holds"), False: ("no", "does not hold"), None: ("open", "could not be judged")}


def cell(text, tag="td", kind=""):
    return f"<{tag}{f' class={kind}' if kind else ''}>{html.escape(str(text))}</{tag}>"


def without_empty_columns(head, rows):
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def table(head, rows):
    """Rows are lists of cells, already HTML."""
    lines = ["<div class=wide><table>", f"<tr>{''.join(cell(name, 'th') for name in head)}</tr>"]
    lines += [f"<tr>{''.join(cells)}</tr>" for cells in rows]
    return "\n".join([*lines, "</table></div>"])


def image(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/svg+xml;base64,{data}">'


def claim_cells(verdict):
    kind, word = VERDICTS[verdict.holds]
    text, paper, expect, measured, holds, asserted = claim_row(verdict)
    code = f"<td><code>{html.escape(expect)}</code></td>"
    reason = f": {holds.removeprefix('not judged: ')}" if verdict.holds is None else ""
    return [cell(text), cell(paper), code, cell(measured), cell(word + reason, kind=kind), cell(asserted)]


def named(experiment, case, content):
    """A case's table under its name; where there are many, one opens those one wants to see."""
    label = html.escape(experiment.case_title(case))
    if not label:
        return content
    if len(experiment.cases) <= OPEN_TABLES:
        return f"<h3>{label}</h3>\n{content}"
    return f"<details><summary>{label}</summary>\n{content}</details>"


def section(results, figures):
    experiment = results.experiment
    parts = [f'<h2 id="{experiment.name}">{html.escape(title(experiment))}</h2>',
             f"<p>{html.escape(introduction(experiment))}</p>"]
    if experiment.needs:
        parts.append(f"<p class=note>Needs {html.escape(experiment.needs)}.</p>")
    parts.append(f"<p class=note>{html.escape(' '.join(notes(results)))}</p>")
    if experiment.claims:
        parts.append(table(CLAIM_HEAD, [claim_cells(verdict) for verdict in results.verdicts()]))
    parts += [image(path) for path in figures]
    for case in experiment.cases:
        texts = [model_row(results, case, model) for model in experiment.models_of(case)]
        head, texts = without_empty_columns(table_head(experiment), texts)
        rows = [[cell(text, kind="number" if i else "") for i, text in enumerate(row)] for row in texts]
        parts.append(named(experiment, case, table(head, rows)))
    return "\n".join(parts)


def summary_cells(results):
    experiment, verdicts = results.experiment, results.verdicts()
    link = f'<td><a href="#{experiment.name}">{html.escape(title(experiment))}</a></td>'
    done = sum(row.finished for row in results.rows)
    counts = [f"<td class={VERDICTS[holds][0] if n else 'note'}>{n}</td>" for holds in VERDICTS
              for n in [sum(v.holds is holds for v in verdicts)]]
    asserted = [verdict.holds for verdict in verdicts if verdict.asserted]
    kept = f"{asserted.count(True)} of {len(asserted)}" if asserted else "none"
    return [link, cell(experiment.source), *counts, cell(kept, kind="no" if results.wrong() else ""),
            cell(f"{done} of {len(results.rows)}"), cell(duration(results.seconds()))]


def page_text(parts, missing=()):
    """parts: (results, figures' paths) of each experiment; missing: (title, why) of those that were not run."""
    head = ["experiment", "source", "claims that hold", "do not hold", "could not be judged", "asserted claims that hold",
            "runs finished", "training time"]
    rows = [summary_cells(results) for results, _ in parts]
    rows += [[cell(name), f'<td colspan="{len(head) - 1}">{html.escape(why)}</td>'] for name, why in missing]
    total = duration(sum(results.seconds() for results, _ in parts))
    return "\n".join([
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>libxlstm: the paper's experiments</title>", f"<style>{STYLE}</style></head><body>",
        "<h1>The paper's experiments</h1>",
        "<p>Experiments of arXiv 2405.04517 that were run here: what the paper claims and whether it held, with the numbers. "
        f"An asserted claim fails the check where it does not hold. Training time in all: {total}.</p>",
        table(head, rows), *(section(results, figures) for results, figures in parts), "</body></html>", ""])


def write_page(parts, path, missing=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page_text(parts, missing))


def result_folders(folders):
    """The folders that hold a results.csv: these, or those within them."""
    found = []
    for folder in folders:
        inner = [folder] if (folder / "results.csv").exists() else sorted(p.parent for p in folder.glob("*/results.csv"))
        if not inner:
            raise DescriptionError(f"{folder}: there is no results.csv, nor in a folder there")
        found += [path for path in inner if ".old-" not in path.name]
    return found


def copy_results(source, target):
    """results.csv and curves.csv as they are in the source; what it lacks, the target does not keep."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "curves.csv"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def rebuild(folders, experiments, into=None):
    """Tables, figures and the page anew from results.csv and curves.csv alone; returns the page's path and the results."""
    found = result_folders(folders)
    if into is not None:
        for folder in found:
            if folder.resolve() != (into / folder.name).resolve():
                copy_results(folder, into / folder.name)
        found = result_folders([into])
    parts = []
    for folder in found:
        name = folder.name.removesuffix("-mini")
        results = Results.read(load(experiments, name, name != folder.name), folder)
        parts.append((results, write(results, folder)))
    page = (into or (folders[0] if folders[0] not in found else folders[0].parent)) / "report.html"
    write_page(parts, page, not_there(experiments, {results.experiment.id for results, _ in parts}))
    return page, [results for results, _ in parts]


def not_there(experiments, present):
    """(title, why) of the experiments that left no results."""
    missing = [Experiment(experiments / name) for name in experiment_ids(experiments) if name not in present]
    return [(e.title, f"no results here; the full size needs {e.needs or 'a GPU'}") for e in missing]
