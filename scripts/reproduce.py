"""The paper's experiments, each by one command: python scripts/reproduce.py ID|--all [--mini] [--check] ...

Trains every model of scripts/reproduce/ID at every learning rate and seed with xlstm-train, measures it, and writes
runs/reproduce/ID[-mini]/table.md, results.csv, curves.csv and figures (SVG, where matplotlib is there); --all does so for
every experiment and writes runs/reproduce/report.html. Kill it at any time; --resume goes on.

Exit status: 0 done; 1 a run failed or, with --check, an asserted claim does not hold or could not be judged; 2 command
line or description; 75 asked to stop, the runs are saved.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from sweep.description import DescriptionError, experiment_ids, load, load_all  # noqa: E402
from sweep.dry_run import dry_run_text, rows  # noqa: E402
from sweep.estimate import MFU_PERCENT, PEAK_TFLOPS, Device, TrainedBefore, costs, estimate_text, parse_mfu  # noqa: E402
from sweep.execution import ASKED_TO_STOP, Programs, Run, SweepError  # noqa: E402
from sweep.launch import command_line, write_files  # noqa: E402
from sweep.machine import visible_gpus  # noqa: E402
from sweep.page import rebuild, write_page  # noqa: E402
from sweep.progress import Progress  # noqa: E402
from sweep.report import table_text, write  # noqa: E402
from sweep.results import Results  # noqa: E402
from sweep.sweeps import Sweep, SweepFolder, execute, lock  # noqa: E402

FAILURES_TOLD = 10  # at the end


def positive(text):
    if (value := int(text)) < 1:
        raise ValueError
    return value


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id", nargs="?", help="experiment; without one they are listed")
    parser.add_argument("--all", action="store_true", help="every experiment, one after another, and report.html")
    parser.add_argument("--mini", action="store_true", help="the miniature, minutes on two cores")
    parser.add_argument("--check", action="store_true", help="status 1 where an asserted claim does not hold")
    sweep = parser.add_argument_group("running")
    sweep.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1 instead of the description's")
    sweep.add_argument("--only", metavar="MODEL,...", help="these models alone")
    existing = sweep.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the sweep in the folder")
    existing.add_argument("--fresh", action="store_true", help="start anew; an existing folder is moved to NAME.old-N")
    sweep.add_argument("--jobs", type=positive, metavar="N",
                       help="runs at once, which share the cores and take the GPUs in turn (1; with --mini one per GPU, "
                            "without any one per core); where speed is measured, 1")
    sweep.add_argument("--processes", type=positive, default=1, metavar="N",
                       help="that train one run together, a GPU each where there are any; torchrun starts them (1)")
    places = parser.add_argument_group("places")
    places.add_argument("--bin", type=Path, default=ROOT / "build" / "bin", metavar="DIR", help="folder of xlstm-train")
    places.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="folder of the sweeps")
    places.add_argument("--experiments", type=Path, default=ROOT / "scripts" / "reproduce", metavar="DIR",
                        help="folder of the descriptions")
    add_what_is_no_sweep(parser)
    options = parser.parse_args(arguments)
    if options.id and options.all:
        parser.error("either an experiment or --all")
    if options.all and options.only:
        parser.error("--only goes with one experiment")
    if options.id is None and any((options.print_jobs, options.launch, options.job)):
        parser.error("--print-jobs, --launch and --job go with one experiment")
    if options.into and not options.report:
        parser.error("--into goes with --report")
    if not (options.id or options.all or options.report) and arguments_beside_places(options, parser):
        parser.error(f"name an experiment, or give --all; there are: {', '.join(experiment_ids(options.experiments))}")
    return options


def arguments_beside_places(options, parser):
    places = ("bin", "out", "experiments")
    return any(value != parser.get_default(name) for name, value in vars(options).items() if name not in places)


def add_what_is_no_sweep(parser):
    group = parser.add_argument_group("instead of running a sweep")
    without = group.add_mutually_exclusive_group()
    without.add_argument("--collect", action="store_true",
                         help="run nothing: table and figures of what has been measured so far")
    without.add_argument("--estimate", action="store_true", help="GPU time of all runs, from xlstm-train --describe")
    without.add_argument("--dry-run", action="store_true",
                         help="parameters, tokens, steps and memory of every model in every case, from xlstm-train --describe")
    without.add_argument("--print-jobs", action="store_true", help="the command of every run, to be started anywhere")
    without.add_argument("--launch", type=Path, metavar="DIR",
                         help="write a SLURM array and a script for a machine with several GPUs, --processes GPUs per run")
    without.add_argument("--job", metavar="NAME", help="one run alone, beside others in the same folder; makes no table")
    without.add_argument("--report", type=Path, nargs="+", metavar="FOLDER",
                         help="make report.html anew from folders with results.csv, or from folders of such folders")
    group.add_argument("--mfu", default="", metavar="PERCENT[,MODEL=PERCENT...]",
                       help=f"with --estimate: utilisation of the GPU ({MFU_PERCENT:g}, as measured; see sweep/estimate.py)")
    group.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS, metavar="N",
                       help=f"with --estimate: what the GPU's matrix product gives ({PEAK_TFLOPS:g})")
    group.add_argument("--step-ms", type=float, default=0.0, metavar="MS", help="with --estimate: no step takes less (0)")
    group.add_argument("--into", type=Path, metavar="DIR",
                       help="with --report: copy results.csv and curves.csv of each there, make the page of all there")


def chosen_models(experiment, only):
    if only is None:
        return None
    models = only.split(",")
    for model in models:
        if model not in experiment.models:
            raise DescriptionError(f"--only: {experiment.id} has no model {model}; it has {', '.join(experiment.models)}")
    return models


def loaded(options):
    """The experiments that the command line means, with its seeds, and (title, why) of those that cannot be run."""
    experiments, missing = (load_all(options.experiments, options.mini) if options.all else
                            ([load(options.experiments, options.id, options.mini)], []))
    for experiment in experiments if options.seeds else ():
        experiment.seeds = list(range(options.seeds))
    return experiments, missing


def jobs_of(options):
    """How many runs go at once, and the GPUs they are dealt to."""
    cores = len(os.sched_getaffinity(0))
    if options.job or options.jobs == 1 or options.processes > 1 or not (options.jobs or options.mini):
        return options.jobs or 1, []
    gpus = visible_gpus()
    return options.jobs or len(gpus) or cores, gpus


def programs_of(options, jobs=1):
    return Programs(options.bin, max(1, len(os.sched_getaffinity(0)) // (jobs * options.processes)), options.processes)


def prepare(options, experiments, jobs):
    """A sweep per experiment, its folder opened."""
    programs = programs_of(options, jobs)
    folders = [SweepFolder(options.out.resolve() / experiment.name) for experiment in experiments]
    if not options.collect:
        for experiment, folder in zip(experiments, folders):
            programs.check(experiment)
            folder.check(options.resume, options.fresh)
    sweeps = []
    for experiment, folder in zip(experiments, folders):
        models = chosen_models(experiment, options.only)
        if not options.collect:
            folder.open(options.resume, options.fresh)
        sweeps.append(Sweep(experiment, folder.path, programs, models, options.collect))
    return sweeps, folders


def sweep_all(sweeps, jobs, gpus):
    """Runs what is to be run; an experiment's table is written when its last run is done."""
    for sweep in sweeps:
        sweep.plan()
    runs = [run for sweep in sweeps for run in sweep.runs]

    def after(run):
        sweep = next(s for s in sweeps if run in s.runs)
        if len(sweeps) > 1 and all(r.done for r in sweep.runs):
            write(Results.of_sweep(sweep), sweep.folder)

    progress = Progress(runs)
    progress.starting(runs, jobs, gpus)
    return execute(runs, jobs, progress, gpus, after)


def run(options):
    experiments, missing = loaded(options)
    jobs, gpus = (1, []) if options.collect else jobs_of(options)
    sweeps, _locked = prepare(options, experiments, jobs)
    finished = options.collect or sweep_all(sweeps, jobs, gpus)
    parts = [(results, write(results, sweep.folder))
             for sweep in sweeps for results in [Results.of_sweep(sweep)]]
    if options.all:
        write_page(parts, options.out / "report.html", missing)
        print(options.out / "report.html")
    else:
        print(table_text(*parts[0]))
        print(sweeps[0].folder / "table.md")
    return status(options, sweeps, [results for results, _ in parts], finished)


def status(options, sweeps, results, finished):
    if not finished:
        return ASKED_TO_STOP
    failed = [run for sweep in sweeps for run in sweep.runs if run.failure]
    for run in failed[:FAILURES_TOLD]:
        print(f"reproduce: {run.experiment.name}/{run.job.name} failed: {run.failure}", file=sys.stderr)
    if failed:
        print(f"reproduce: {len(failed)} runs failed; --resume tries them again", file=sys.stderr)
    return 1 if failed else check(options, results)


def check(options, results):
    wrong = [(each.experiment, verdict) for each in results for verdict in each.wrong()] if options.check else []
    for experiment, verdict in wrong:
        what = "does not hold" if verdict.holds is False else "could not be judged"
        print(f"reproduce: {experiment.name} {what}: {verdict.claim['text']}: {verdict.claim['expect']}", file=sys.stderr)
    return 1 if wrong else 0


def run_job(options):
    """One run of a sweep, in its place in the sweep's folder."""
    experiment = loaded(options)[0][0]
    job = next((job for job in experiment.jobs(elsewhere=True) if job.name == options.job), None)
    if job is None:
        raise DescriptionError(f"--job: {experiment.name} has no {options.job}; --print-jobs lists them")
    if needs := experiment.needs_of(job.case, job.model):
        raise DescriptionError(f"--job: {experiment.name}/{job.name} needs {needs}")
    programs = programs_of(options, jobs_of(options)[0])
    programs.check(experiment)
    folder = SweepFolder(options.out.resolve() / experiment.name)
    folder.share()
    path = folder.path / f"{job.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = lock(path)
    if held is None:
        raise SweepError(f"{path}: another reproduce.py is at work on this run")
    one = Run(experiment, job, folder.path, programs)
    if not execute([one], 1, Progress([one])):
        return ASKED_TO_STOP
    return 1 if one.failure else 0


def estimate(options):
    device, programs = Device(options.peak_tflops, parse_mfu(options.mfu), options.step_ms), programs_of(options)
    print(f"{device}\n")
    before = TrainedBefore()
    for experiment in loaded(options)[0]:
        models = chosen_models(experiment, options.only)
        found = costs(experiment, programs, models, elsewhere=True) if experiment.trains else []
        print(estimate_text(experiment, found, device, before.add(experiment, models)))
    return 0


def dry_run(options):
    """Weights: float32, with gradients and the optimizer's two numbers per weight where it trains."""
    programs = programs_of(options)
    print("weights GiB: with gradients and AdamW's moments, where it trains; activations GiB: of a micro batch; -: not known\n")
    for experiment in loaded(options)[0]:
        print(dry_run_text(experiment, rows(experiment, programs, chosen_models(experiment, options.only))))
    return 0


def launch(options):
    experiment = loaded(options)[0][0]
    jobs = experiment.jobs(chosen_models(experiment, options.only), elsewhere=True)
    if not jobs:
        raise DescriptionError(f"{experiment.name}: none of its runs can be run; see `needs` in {experiment.source_file}")
    if options.print_jobs:
        print("\n".join(command_line(options, Path(__file__).resolve(), sys.executable, "--job", job.name) for job in jobs))
    else:
        print("\n".join(map(str, write_files(options.launch, experiment, jobs, options, Path(__file__).resolve(),
                                              sys.executable))))
    return 0


def report(options):
    page, results = rebuild(options.report, options.experiments, options.into)
    print(page)
    return check(options, results)


def list_experiments(options):
    for experiment in load_all(options.experiments)[0]:
        print(f"{experiment.id:24} {experiment.title}")
    return 0


def main(arguments=None):
    options = parse(arguments)
    try:
        if options.report:
            return report(options)
        if options.id is None and not options.all:
            return list_experiments(options)
        action = (estimate if options.estimate else dry_run if options.dry_run else
                  launch if options.print_jobs or options.launch else run_job if options.job else run)
        return action(options)
    except (DescriptionError, SweepError) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
