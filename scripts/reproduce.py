"""The paper's experiments, each by one command: python scripts/reproduce.py ID [--mini] [--check] ...

Trains every model of scripts/reproduce/ID at every learning rate and seed with xlstm-train, measures it, and writes
runs/reproduce/ID[-mini]/table.md and results.csv. Kill it at any time; --resume goes on.

Exit status: 0 done; 1 a run failed or, with --check, an asserted claim does not hold or could not be judged; 2 command
line or description; 75 asked to stop, the runs are saved.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from sweep.claims import ClaimError  # noqa: E402
from sweep.description import DescriptionError, experiment_ids, load  # noqa: E402
from sweep.execution import Programs, Sweep, SweepError, SweepFolder  # noqa: E402
from sweep.progress import Progress  # noqa: E402
from sweep.report import Results, table_text, write  # noqa: E402


def positive(text):
    if (value := int(text)) < 1:
        raise ValueError
    return value


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id", nargs="?", help="experiment; without one they are listed")
    parser.add_argument("--mini", action="store_true", help="the miniature, minutes on two cores")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1 instead of the description's")
    parser.add_argument("--only", metavar="MODEL,...", help="these models alone")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in the folder")
    parser.add_argument("--fresh", action="store_true", help="start anew; an existing folder is moved to NAME.old-N")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at once; they share the cores (1)")
    parser.add_argument("--check", action="store_true", help="status 1 where an asserted claim does not hold")
    parser.add_argument("--bin", type=Path, default=ROOT / "build" / "bin", metavar="DIR", help="folder of xlstm-train")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="folder of the sweeps")
    parser.add_argument("--experiments", type=Path, default=ROOT / "scripts" / "reproduce", metavar="DIR",
                        help="folder of the descriptions")
    return parser.parse_args(arguments)


def chosen_models(experiment, only):
    if only is None:
        return None
    models = only.split(",")
    for model in models:
        if model not in experiment.models:
            raise DescriptionError(f"--only: {experiment.id} has no model {model}; it has {', '.join(experiment.models)}")
    return models


def run(options):
    experiment = load(options.experiments, options.id, options.mini)
    if options.seeds:
        experiment.seeds = list(range(options.seeds))
    models = chosen_models(experiment, options.only)
    programs = Programs(options.bin, max(1, (os.cpu_count() or 1) // options.jobs))
    programs.check(experiment)
    folder = SweepFolder(options.out.resolve() / experiment.name)
    folder.open(options.resume, options.fresh)
    sweep = Sweep(experiment, folder.path, programs, models)
    finished = sweep.execute(options.jobs, Progress(sweep.runs))
    results = Results(sweep)
    write(results, folder.path)
    print(table_text(results))
    print(folder.path / "table.md")
    if not finished:
        return 75
    if any(r.failure for r in sweep.runs):
        return 1
    wrong = [v for v in results.verdicts() if v.asserted and not v.holds and not (v.holds is None and results.excused(v))]
    for verdict in wrong if options.check else ():
        print(f"reproduce: does not hold: {verdict.claim['text']}: {verdict.claim['expect']}", file=sys.stderr)
    return 1 if wrong and options.check else 0


def main(arguments=None):
    options = parse(arguments)
    if options.id is None:
        print("\n".join(experiment_ids(options.experiments)))
        return 0
    try:
        return run(options)
    except (DescriptionError, ClaimError, SweepError) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
