"""What the benchmarks of single operators on a GPU share: their command line, and how they end."""

import argparse
import re
import time
from pathlib import Path

import torch
from timing import Effort, clocks, write_report


def parser(doc: str, name: str, suites: str, heads: str) -> argparse.ArgumentParser:
    """`heads`: an example of what --heads takes."""
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    made.add_argument("--suites", default=suites, help="comma list, default all")
    made.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default bfloat16, float32 on the CPU")
    made.add_argument("--seconds", type=float, default=1.0, help="time per measurement (at least 5 samples)")
    made.add_argument("--limit", type=float, default=float("inf"), help="start no further case after so many seconds")
    made.add_argument("--no-peers", dest="peers", action="store_false", help="time ours alone")
    made.add_argument("--peer", default="", help="time only peers whose name matches this regular expression")
    made.add_argument("--heads", default="", help="time only these head sizes, e.g. " + heads)
    made.add_argument("--tiny", action="store_true", help="small sizes, to try the script out")
    made.add_argument("--library", help="libxlstm_ops.so; default: the one that `import libxlstm` finds")
    made.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    made.add_argument("--name", default=name, help="name of the files written")
    return made


def parse(made: argparse.ArgumentParser, arguments) -> argparse.Namespace:
    """Also sets `effort` and `end`, the time after which no further case starts."""
    args = made.parse_args(arguments)
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16"))
    args.suites = args.suites.split(",")
    args.heads = [tuple(map(int, each.split("x"))) for each in args.heads.split(",") if each]
    args.effort = Effort(warm_up=2, calls=2, samples=5, seconds=0.02) if args.tiny else Effort(seconds=args.seconds)
    args.end = time.monotonic() + args.limit
    if args.device.type == "cuda" and not torch.cuda.is_available():
        made.exit(2, "error: torch sees no GPU here (--device cpu --tiny tries the script out)\n")
    return args


def wanted_peers(operators: list, args: argparse.Namespace) -> list:
    """Those that --peer leaves."""
    return [each for each in operators if re.search(args.peer, each.name)]


def wanted_heads(shapes: list, args: argparse.Namespace) -> list:
    """Those that --heads leaves."""
    return [shape for shape in shapes if not args.heads or tuple(shape) in args.heads]


def finish(report: dict, bad: list, args: argparse.Namespace, plot) -> int:
    """Tells what was skipped and what is `bad`, writes the report and what plot(report, path) draws of it; the exit status."""
    report["machine"]["clocks_at_end"] = clocks()
    report["bad"] = bad
    for title in report["skipped"]:
        print(f"skipped for want of time: {title}")
    write_report(args.out / f"{args.name}.json", report)
    drawn = plot(report, args.out / f"{args.name}.png")
    print(f"\nwrote {args.out / args.name}.json" + (f" and {args.name}.png" if drawn else ""))
    for each in bad:
        print(f"FAIL {each}")
    return 1 if bad else 0
