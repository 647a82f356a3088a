"""The xlstm-* commands: each replaces this process by the C++ program of the same name that is installed here."""

import os
import sys
from pathlib import Path


def _run(program: str) -> None:
    folder = Path(__file__).resolve().parent
    for candidate in (folder / "bin" / program, folder.parent / "build" / "bin" / program):
        if candidate.exists():
            # The programs call Python for tokenizers and plots: this interpreter has the packages.
            os.environ.setdefault("XLSTM_PYTHON", sys.executable)
            os.execv(candidate, [program, *sys.argv[1:]])
    sys.exit(f"{program}: not found beside {folder}; install with: pip install --no-build-isolation .")


def train() -> None:
    _run("xlstm-train")


def generate() -> None:
    _run("xlstm-generate")


def evaluate() -> None:
    _run("xlstm-eval")


def data() -> None:
    _run("xlstm-data")


def bench() -> None:
    _run("xlstm-bench")
