"""What the programs print and cannot deliver: a full disk is status 4, a reader that has left ends them without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import BIN, TinyRun, environment, program  # noqa: E402


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Name -> a call that prints."""
    run = TinyRun(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("shared"), steps=2, every=2)
    run.train(check=0)
    (run.folder / "a.txt").write_text("a text")
    tokens = run.folder / "tokens"
    program("xlstm-data", "prepare", run.folder / "a.txt", "--output", tokens, check=0)
    return {"settings": ["xlstm-train", run.config, "--print-config"], "describe": ["xlstm-train", run.config, "--describe"],
            "dry_run": ["xlstm-train", run.config, "--dry-run"], "help": ["xlstm-train", "--help"],
            "eval_help": ["xlstm-eval", "--help"], "eval": ["xlstm-eval", run.path, "--data", tokens],
            "stats": ["xlstm-data", "stats", tokens], "verify": ["xlstm-data", "verify", tokens],
            "bench": ["xlstm-bench", run.config, "--steps", "0", "--tokens", "1"],
            "generate": ["xlstm-generate", run.path, "--prompt", "a", "--max-new-tokens", "5"]}


NAMES = ("settings", "describe", "dry_run", "help", "eval_help", "eval", "stats", "verify", "bench", "generate")


def call(arguments, stdout):
    return subprocess.run([BIN / arguments[0], *arguments[1:]], stdout=stdout, stderr=subprocess.PIPE, text=True,
                          env=environment(), timeout=120)


@pytest.mark.parametrize("name", NAMES)
def test_output_on_a_full_disk_is_an_error(calls, name):
    with open("/dev/full", "w") as full:
        done = call(calls[name], full)
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{calls[name][0]}: error: standard output: ")


@pytest.mark.parametrize("name", ("settings", "dry_run", "eval", "generate"))
def test_a_reader_that_has_left(calls, name):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = call(calls[name], pipe)
    assert done.returncode == 141 and "error" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["xlstm-train", "xlstm-generate", "xlstm-eval", "xlstm-data", "xlstm-bench"])
def test_h_is_help(name):
    assert program(name, "-h", check=0).stdout == program(name, "--help", check=0).stdout != ""
