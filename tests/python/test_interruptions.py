"""xlstm-train that is stopped, killed or cannot save: what is kept, what it says, and how it goes on."""

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_train import (  # noqa: F401
    PROGRAM, another_prepares_the_text, corpus, fingerprint, losses, one_line_error, records, setup, train,
)

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")


def test_killed_runs_end_with_the_same_bits(setup):  # noqa: F811
    config, run = setup
    assert train(config).returncode == 0
    expected, expected_losses = fingerprint(run, 12), losses(run)
    assert train(config, "--fresh", failpoint="trainer.step_end:2").returncode == -signal.SIGKILL
    assert (run.parent / "demo.old-1" / "run.json").exists()
    assert not list((run / "ckpt").iterdir())  # nothing saved yet: the same command starts at step 0
    assert train(config, failpoint="trainer.step_end:7").returncode == -signal.SIGKILL
    assert train(config, failpoint="trainer.step_end:9").returncode == -signal.SIGKILL
    done = train(config)
    assert done.returncode == 0 and "resumed from" in done.stdout
    assert fingerprint(run, 12) == expected
    assert losses(run) == expected_losses
    assert len([r for r in records(run) if "train/loss" in r]) == 12  # no step twice
    assert [r["step"] for r in records(run) if r.get("event") == "resume"] == [4, 8]
    assert (run / "metrics.jsonl.bak").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(setup, number):  # noqa: F811
    config, run = setup
    process = subprocess.Popen([PROGRAM, config, "train.max_steps=1000000", "eval.every=0", "ckpt.every=0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert number.name in out and "run the same command again: " in out and str(config) in out
    step = max(losses(run))
    assert [p.name for p in (run / "ckpt").iterdir()] == [f"step-{step:08d}"]


def start(config, *arguments, **options):
    return subprocess.Popen([PROGRAM, config, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "XLSTM_PYTHON": sys.executable}, **options)


def wait_for(process, beginning):
    """For a line of its output that begins so."""
    assert any(line.startswith(beginning) for line in process.stdout), f"no {beginning!r}: {process.stderr.read()}"


def end_of(process, code, timeout=60):
    """What the run has written, once it has ended with this status."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


def stopped(process, send=None):
    """The same of a run that a signal stops soon."""
    (send or process.send_signal)(signal.SIGTERM)
    return end_of(process, 75, timeout=20)[0]


def evaluations(run):
    return [(r["step"], r["val/loss"]) for r in records(run) if "val/loss" in r]


@pytest.mark.parametrize("where, arguments", [
    (5, ["eval.batches=0", "eval.every=5"]),
    (12, ["eval.batches=0", "eval.every=0"]),
    (5, ["sample.max_new_tokens=10000000", "eval.every=0"]),
])
def test_a_signal_does_not_wait_for_evaluations_and_samples(setup, corpus, where, arguments):  # noqa: F811
    config, run = setup
    large = corpus / "large.txt"
    if not large.exists():
        large.write_text("some words to be held out, more than can be judged soon\n" * 100_000)
    always = [f"data.val_text={large}", "ckpt.every=5", "ckpt.keep_last=9", "sample.every=5", "sample.temperature=0"]
    soon = [*always, arguments[-1], "eval.batches=1"]
    process = start(config, *always, *arguments)
    wait_for(process, f"step {where}/")
    time.sleep(0.3)
    out = stopped(process)
    assert f"stopped by SIGTERM at step {where} of 12, everything is saved" in out
    assert (run / "ckpt" / f"step-{where:08d}" / "MANIFEST.json").exists()
    assert not evaluations(run) and (run / "samples.jsonl").exists() == (where > 5)
    assert train(config, *soon).returncode == 0
    assert train(config, *soon, "run.name=whole").returncode == 0
    whole = run.parent / "whole"
    assert evaluations(run) == evaluations(whole) and evaluations(run)[-1][0] == 12
    assert records(run, "samples.jsonl") == records(whole, "samples.jsonl")
    assert fingerprint(run, 12) == fingerprint(whole, 12)


def test_a_run_killed_after_its_last_save_writes_what_is_missing(setup):  # noqa: F811
    config, run = setup
    assert train(config, failpoint="trainer.step_end:12").returncode == -signal.SIGKILL
    assert not (run / "samples.jsonl").exists()
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert train(config, "run.name=whole").returncode == 0
    whole = run.parent / "whole"
    assert evaluations(run) == evaluations(whole)
    assert records(run, "samples.jsonl") == records(whole, "samples.jsonl")
    assert train(config).stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert [r["event"] for r in records(run) if "event" in r] == ["start", "resume", "end"]


def test_a_signal_while_another_process_prepares_the_text(setup, tmp_path):  # noqa: F811
    config, _ = setup
    with another_prepares_the_text(config, tmp_path / "cache") as cache:
        process = start(config, cache)
        assert process.stderr.readline().startswith("waiting for another process")
        out = stopped(process)
    assert "stopped by SIGTERM before training began" in out and "run the same command again" in out
    assert train(config, cache).returncode == 0


def make_tokenizer(path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["line of a text"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet))
    tokenizer.save(str(path))
    return [f"data.tokenizer={path}", "model.vocab_size=300"]


def test_a_signal_to_the_whole_group_and_a_lost_tokenizer(setup, tmp_path):  # noqa: F811
    config, run = setup
    tokenizer = tmp_path / "words.json"
    arguments = make_tokenizer(tokenizer)
    content = tokenizer.read_bytes()
    process = start(config, *arguments, "train.max_steps=1000000", "sample.every=1", "eval.every=0", "ckpt.every=2",
                    start_new_session=True)
    wait_for(process, "step 3/")
    tokenizer.write_text("another one")
    wait_for(process, "step 6/")
    tokenizer.unlink()
    wait_for(process, "step 9/")
    stopped(process, lambda number: os.killpg(process.pid, number))
    saved = sorted((run / "ckpt").iterdir())
    assert int(saved[-1].name[5:]) >= 9 and [(s / "tokenizer.json").read_bytes() for s in saved] == [content] * len(saved)


def test_a_sample_that_fails_is_a_warning(setup, tmp_path):  # noqa: F811
    config, run = setup
    process = start(config, *make_tokenizer(tmp_path / "words.json"), "train.max_steps=60", "sample.every=1", "eval.every=0")
    wait_for(process, "step 3/")
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    out, err = end_of(process, 0)
    assert err.count("are not written: tokenizer") == 1 and "ended with signal 9" in err


def test_the_command_to_go_on_with(setup):  # noqa: F811
    config, run = setup
    first = train(config, "--resume", "never", "--fresh", failpoint="trainer.raise_sigterm:3")
    assert first.returncode == 75
    again = re.search(r"run the same command again: (.*)", first.stdout).group(1)
    assert again == f"{PROGRAM} {config} --resume=auto"
    done = subprocess.run(again, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "step-00000003" in done.stdout, done.stderr


def test_the_command_to_go_on_with_keeps_what_is_no_option(setup):  # noqa: F811
    config, run = setup
    odd = config.rename(config.parent / "x=1.yaml").name
    again = f"{PROGRAM} run.name=q2 --resume=auto -- {odd}"
    first = train("run.name=q2", "--resume=never", "--", odd, failpoint="trainer.raise_sigterm:3", cwd=config.parent)
    assert first.returncode == 75 and first.stdout.splitlines()[-1].endswith(f"run the same command again: {again}")
    done = subprocess.run(again, shell=True, capture_output=True, text=True, timeout=60, cwd=config.parent)
    assert done.returncode == 0 and "step-00000003" in done.stdout, done.stderr


def test_dry_run_knows_the_tokenizer_of_prepared_text(setup, corpus, tmp_path):  # noqa: F811
    """As the last start wrote it down, which this one repeats."""
    config, run = setup
    tokenizer, vocab = make_tokenizer(tmp_path / "words.json")
    tokens = tmp_path / "tokens"
    subprocess.run([PROGRAM.parent / "xlstm-data", "prepare", corpus / "text.txt", "--output", tokens, "--tokenizer",
                    tokenizer.split("=")[1]], check=True, capture_output=True, env={**os.environ, "XLSTM_PYTHON": sys.executable})
    prepared = ["data.text=", f"data.train=[{{path: {tokens}}}]", vocab]
    assert train(config, *prepared).returncode == 0
    named = [*prepared, "--resume", "step-8", "optim.learning_rate=2e-2", "ckpt.keep_last=9"]
    assert train(config, *named, failpoint="trainer.raise_sigterm:10").returncode == 75
    assert re.search(r"^start .*step-00000010$", train(config, *named, "--dry-run").stdout, re.M)
    assert f"resumed from {run}/ckpt/step-00000010" in train(config, *named).stdout


def test_checkpoints_on_another_disk(setup):  # noqa: F811
    config, run = setup
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(config).st_dev:
        pytest.skip("no other disk here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        run.mkdir(parents=True)
        (run / "ckpt").symlink_to(disk)
        assert train(config, "ckpt.keep_last=9").returncode == 0
        done = train(config, "--resume", "step-8", "train.max_steps=10", "ckpt.keep_last=9")
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in Path(disk).iterdir()) == ["old-1", "step-00000004", "step-00000008", "step-00000010"]
        assert (Path(disk) / "old-1" / "step-00000012" / "MANIFEST.json").exists()


def test_a_start_from_a_named_checkpoint_may_be_repeated(setup):  # noqa: F811
    config, run = setup
    assert train(config).returncode == 0
    named = ["--resume", "step-8", "optim.learning_rate=2e-2", "ckpt.keep_last=9"]
    assert train(config, *named, failpoint="trainer.raise_sigterm:10").returncode == 75
    done = train(config, *named)
    assert done.returncode == 0 and f"resumed from {run}/ckpt/step-00000010" in done.stdout, done.stderr
    assert "changed since then" not in done.stdout
    other = train(config, "--resume", "step-8", "optim.learning_rate=1e-2")  # not the same command
    assert f"resumed from {run}/ckpt/step-00000008" in other.stdout, other.stderr


def test_what_has_changed_is_told_and_kept(setup):  # noqa: F811
    config, run = setup
    assert train(config, "train.max_steps=6").returncode == 0
    done = train(config, "optim.beta2=0.9", "log.every=2")
    assert done.returncode == 0, done.stderr
    (told,) = re.findall(r"changed since then: (.*)$", done.stdout, re.M)
    assert told == "train.max_steps 6 -> 12, optim.beta2 0.95 -> 0.9, learning rate 0.001 -> 0.00628"
    (event,) = [record for record in records(run) if record.get("event") == "resume"]
    assert event["changed"] == told


def test_a_folder_renamed_while_it_trains(setup):  # noqa: F811
    config, run = setup
    process = start(config, "train.max_steps=1000000", "ckpt.max_failed_saves=2", "eval.every=0")
    wait_for(process, "step 5/")
    run.rename(run.parent / "renamed")
    out, err = end_of(process, 4)
    assert "No such file" in err and "still there" in err, err
    assert not run.exists() and (run.parent / "renamed" / "ckpt" / "step-00000004").exists()


def test_two_trainers_in_one_folder(setup):  # noqa: F811
    config, run = setup
    first = subprocess.Popen([PROGRAM, config, "train.max_steps=1000000"], stdout=subprocess.PIPE, text=True)
    try:
        for line in first.stdout:
            if line.startswith("step 1/"):
                break
        assert f"pid {first.pid}" in one_line_error(train(config), 4)
    finally:
        first.kill()
        first.communicate()


def test_saves_that_fail(setup):  # noqa: F811
    config, run = setup

    def small_files():  # every file of a checkpoint that is larger fails to be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = ["ckpt.every=2", "log.tensorboard=false"]
    assert train(config, *arguments, "train.max_steps=2").returncode == 0
    good = fingerprint(run, 2)
    done = train(config, *arguments, "ckpt.max_failed_saves=10", preexec_fn=small_files)
    message = one_line_error(done, 4)  # the last one must succeed
    assert "step 12" in message and "free" in message
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: checkpoint of step")]
    assert len(warnings) == 4 and all("training goes on" in line and "step 2" in line for line in warnings)
    assert fingerprint(run, 2) == good and [p.name for p in (run / "ckpt").iterdir()] == ["step-00000002"]
    assert [r["ckpt/failed"] for r in records(run) if "ckpt/failed" in r] == [1, 2, 3, 4, 5]
    done = train(config, *arguments, "ckpt.max_failed_saves=2", preexec_fn=small_files)
    assert "step 6" in one_line_error(done, 4)
    assert train(config, *arguments).returncode == 0
