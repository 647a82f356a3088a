"""xlstm-train by several processes: the same run as one process, stopped and killed together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_train import (  # noqa: F401
    PROGRAM, ROOT, another_prepares_the_text, corpus, fingerprint, losses, records, setup, train,
)

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")

TWO_MICRO_BATCHES = "train.micro_batch_size=2"  # of the 4 samples of a step: as two processes have them
RECOMPUTED = "model.activation_checkpointing=true"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def has_localhost():
    try:
        return bool(socket.getaddrinfo("localhost", None))
    except OSError:
        return False


under_torchrun = pytest.mark.skipif(not has_localhost(), reason="torchrun needs the name localhost, which /etc/hosts has not")


def start(config, *arguments, size=2, own=None, failpoint="", failing=None):
    """The processes as torchrun starts them; own: {rank: arguments of that process alone}; failing: the rank of the only one
    that has the failpoint."""
    environment = {**os.environ, "XLSTM_PYTHON": sys.executable, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("XLSTM_FAILPOINT", None)
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    faults = [failpoint if failing in (None, rank) else "" for rank in range(size)]
    return [subprocess.Popen([PROGRAM, config, *arguments, *(own or {}).get(rank, [])], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "XLSTM_FAILPOINT": faults[rank]})
            for rank in range(size)]


def finish(processes):
    """(exit status, standard output, standard error) of each."""
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def together(*arguments, **options):
    return finish(start(*arguments, **options))


def wait_for_step(run, step):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run does not come that far")


@pytest.mark.parametrize("options", [[], [RECOMPUTED, "model.tie_weights=true"]])
def test_two_processes_are_one_with_two_micro_batches(setup, options):  # noqa: F811
    config, run = setup
    done = train(config, *options, TWO_MICRO_BATCHES, "run.name=alone")
    assert done.returncode == 0, done.stderr
    (out, err, status), (other_out, other_err, other_status) = together(config, *options)
    assert status == other_status == 0, err + other_err
    assert other_out == other_err == ""  # one process speaks for all
    assert "in each of 2 processes" in out and out.splitlines()[-1] == done.stdout.splitlines()[-1]
    alone = run.parent / "alone"
    assert losses(run) == losses(alone) and len(losses(run)) == 12
    assert fingerprint(run, 12) == fingerprint(alone, 12)
    held_out = [[r["val/loss"] for r in records(folder) if "val/loss" in r] for folder in (run, alone)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-12) and len(held_out[0]) == 3


def test_adapters_of_two_processes_are_those_of_one(setup):  # noqa: F811
    config, run = setup
    base = [RECOMPUTED, "model.embedding_dim=64"]
    assert train(config, *base, "run.name=given", "train.max_steps=2").returncode == 0
    adapters = [*base, "model.lora.rank=2", f"train.init_from={run.parent / 'given'}"]
    assert train(config, *adapters, TWO_MICRO_BATCHES, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, *adapters)] == [0, 0]
    assert losses(run) == losses(run.parent / "alone") and len(losses(run)) == 12
    assert fingerprint(run, 12) == fingerprint(run.parent / "alone", 12)


def test_micro_batches_of_two_processes(setup):  # noqa: F811
    config, run = setup
    one_by_one = "train.micro_batch_size=1"
    assert train(config, one_by_one, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, one_by_one, failpoint="trainer.raise_sigterm:5")] == [75, 75]
    assert [status for _, _, status in together(config, one_by_one)] == [0, 0]
    assert [status for _, _, status in together(config, one_by_one, "optim.shard=true", "run.name=shared")] == [0, 0]
    here, alone = ([float.fromhex(x) for x in losses(folder).values()] for folder in (run, run.parent / "alone"))
    assert len(here) == 12 and here == pytest.approx(alone, rel=1e-5)
    assert losses(run.parent / "shared") == losses(run)
    assert fingerprint(run.parent / "shared", 12) == fingerprint(run, 12)


def test_carried_states_are_those_of_one_process_whoever_goes_on(setup):  # noqa: F811
    config, run = setup
    carry, stop = ["train.carry_state=true"], "trainer.raise_sigterm:5"
    by_one, by_two = [*carry, TWO_MICRO_BATCHES], carry
    assert train(config, *by_one, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, *by_two, failpoint=stop)] == [75, 75]
    assert train(config, *by_one).returncode == 0
    assert train(config, *by_one, "run.name=spread", failpoint=stop).returncode == 75
    assert [status for _, _, status in together(config, *by_two, "run.name=spread")] == [0, 0]
    alone = run.parent / "alone"
    for other in (run, run.parent / "spread"):
        assert losses(other) == losses(alone) and len(losses(other)) == 12
        assert fingerprint(other, 12) == fingerprint(alone, 12)
        carried = ((folder / "ckpt" / "step-00000012" / "carried.safetensors").read_bytes() for folder in (other, alone))
        assert len(set(carried)) == 1


def test_four_processes_differ_by_rounding_alone(setup):  # noqa: F811
    config, run = setup
    assert train(config, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, size=4)] == [0] * 4
    here, alone = ([float.fromhex(x) for x in losses(folder).values()] for folder in (run, run.parent / "alone"))
    assert here == pytest.approx(alone, rel=1e-4)


def test_a_shared_optimizer_has_the_same_bits(setup):  # noqa: F811
    config, run = setup
    for name, size, shard in (("whole", 2, "false"), ("two", 2, "true"), ("four_whole", 4, "false"), ("four", 4, "true")):
        ended = together(config, f"run.name={name}", f"optim.shard={shard}", size=size)
        assert [status for _, _, status in ended] == [0] * size, ended
        assert ("of the optimizer's state" in ended[0][0]) == (shard == "true")
    for shared, whole in (("two", "whole"), ("four", "four_whole")):
        assert losses(run.parent / shared) == losses(run.parent / whole)
        for step in (8, 12):
            assert fingerprint(run.parent / shared, step) == fingerprint(run.parent / whole, step)


def test_who_shares_the_optimizer_may_change_from_start_to_start(setup):  # noqa: F811
    config, run = setup
    assert train(config, TWO_MICRO_BATCHES, "run.name=alone").returncode == 0
    shared, stop = "optim.shard=true", "trainer.raise_sigterm:{}"
    assert [status for _, _, status in together(config, shared, failpoint=stop.format(3))] == [75, 75]
    assert train(config, TWO_MICRO_BATCHES, shared, failpoint=stop.format(5)).returncode == 75
    assert [status for _, _, status in together(config, shared, failpoint=stop.format(7))] == [75, 75]
    assert [status for _, _, status in together(config, failpoint=stop.format(9))] == [75, 75]
    assert [status for _, _, status in together(config, shared)] == [0, 0]
    assert losses(run) == losses(run.parent / "alone")
    assert fingerprint(run, 12) == fingerprint(run.parent / "alone", 12)


def test_one_of_those_that_share_the_optimizer_is_killed_while_saving(setup):  # noqa: F811
    config, run = setup
    shared = "optim.shard=true"
    ended = together(config, shared, failpoint="ckpt.before_rename:8", failing=0)
    assert ended[0][2] < 0 and ended[1][2] == 6, ended
    assert [status for _, _, status in together(config, shared)] == [0, 0]
    assert [status for _, _, status in together(config, "run.name=whole")] == [0, 0]
    assert fingerprint(run, 12) == fingerprint(run.parent / "whole", 12)


@under_torchrun
def test_torchrun(setup):  # noqa: F811
    config, run = setup
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "--no-python", PROGRAM, config, "train.max_steps=3"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "XLSTM_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    assert sorted(losses(run)) == [1, 2, 3]


EXPERIMENT = """
title: Two processes
source: nowhere
base:
  model: {{vocab_size: 256, embedding_dim: 16, num_blocks: 1, num_heads: 1}}
  data: {{text: {text}, cache_dir: {cache}, seq_len: 16}}
  train: {{global_batch_size: 4, max_steps: 4}}
  optim: {{warmup_steps: 0, min_lr: 0}}
  eval: {{batches: 2}}
models: {{xlstm: {{}}}}
learning_rates: [0.01]
measure: loss
better: lower
"""


@under_torchrun
def test_a_sweep_whose_runs_have_two_processes(tmp_path, corpus):  # noqa: F811
    folder = tmp_path / "experiments" / "two"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT.format(text=corpus / "text.txt", cache=corpus / "cache"))
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", "two", "--processes", "2", "--bin", PROGRAM.parent,
               "--experiments", folder.parent, "--out"]
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out" / "two" / "all" / "xlstm" / "lr0.01_seed0.log").read_text()
    assert "in each of 2 processes" in log
    done = subprocess.run([*command, tmp_path / "bad"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "XLSTM_FAILPOINT": "trainer.nan_grad:3"})
    assert "diverged" in (tmp_path / "bad" / "two" / "results.csv").read_text(), done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_and_one_alone_goes_on(setup, rank):  # noqa: F811
    config, run = setup
    assert train(config, TWO_MICRO_BATCHES, "run.name=alone", "train.max_steps=400").returncode == 0
    processes = start(config, "train.max_steps=400")
    wait_for_step(run, 20)
    processes[rank].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for _, _, status in ended] == [75, 75], ended
    assert "everything is saved" in ended[0][0]
    assert 20 <= max(losses(run)) < 400
    done = train(config, TWO_MICRO_BATCHES, "train.max_steps=400")  # the number of processes may change
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(run.parent / "alone")
    assert fingerprint(run, 400) == fingerprint(run.parent / "alone", 400)


def stopped_by_the_second(processes):
    """The output of the first, where a signal to the second soon stops both."""
    start_time = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for _, _, status in ended] == [75, 75], ended
    assert time.monotonic() - start_time < 20
    return ended[0][0]


def test_a_signal_to_another_process_does_not_wait_for_samples(setup):  # noqa: F811
    config, run = setup
    often = ["sample.every=5", "sample.temperature=0", "eval.every=0"]
    processes = start(config, *often, "sample.max_new_tokens=10000000")
    wait_for_step(run, 5)
    time.sleep(0.3)
    assert "stopped by a signal to another process at step 5 of 12, everything is saved" in stopped_by_the_second(processes)
    assert [status for _, _, status in together(config, *often)] == [0, 0]
    assert [r["step"] for r in records(run, "samples.jsonl")] == [5, 10, 12]


def test_a_signal_to_another_process_does_not_wait_for_the_text(setup, tmp_path):  # noqa: F811
    config, _ = setup
    with another_prepares_the_text(config, tmp_path / "cache") as cache:
        processes = start(config, cache)
        assert processes[0].stderr.readline().startswith("waiting for another process")
        assert "before training began" in stopped_by_the_second(processes)


def test_dropout_goes_on_as_if_never_stopped(setup):  # noqa: F811
    config, run = setup
    options = ["model.dropout=0.2", "model.add_embedding_dropout=true"]
    assert [status for _, _, status in together(config, *options)] == [0, 0]
    options.append("run.name=stopped")
    assert [status for _, _, status in together(config, *options, failpoint="trainer.raise_sigterm:6")] == [75, 75]
    assert [status for _, _, status in together(config, *options)] == [0, 0]
    assert losses(run.parent / "stopped") == losses(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_is_killed_the_other_ends_and_says_so(setup, rank):  # noqa: F811
    config, run = setup
    processes = start(config, "train.max_steps=100000")
    wait_for_step(run, 8)
    processes[rank].kill()
    start_time = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - start_time < 10
    assert ended[1 - rank][2] == 6, ended
    assert f"process {1 - rank} of 2: another process failed" in ended[1 - rank][1]
    saved = max(int(folder.name[5:]) for folder in (run / "ckpt").glob("step-*") if (folder / "MANIFEST.json").exists())
    assert [status for _, _, status in together(config, f"train.max_steps={saved + 2}")] == [0, 0]
    assert max(losses(run)) == saved + 2


def waiting(config, first):
    """The processes of a run of which one came alone, and what it says then."""
    processes = start(config)
    processes[1 - first].send_signal(signal.SIGSTOP)
    return processes, processes[first].stderr.readline()


@pytest.mark.parametrize("first", [0, 1])
def test_who_comes_first_says_for_whom_it_waits(setup, first):  # noqa: F811
    config, _ = setup
    processes, told = waiting(config, first)
    assert re.fullmatch(rf"process {first} of 2 waits for process {1 - first} to come to 127.0.0.1:\d+, for up to 10 minutes\n",
                        told), told
    processes[1 - first].send_signal(signal.SIGCONT)
    ended = finish(processes)
    assert [status for _, _, status in ended] == [0, 0] and "waits for" not in ended[first][1], ended  # it says so once


def test_a_signal_to_one_that_waits_stops_it(setup):  # noqa: F811
    config, _ = setup
    processes, _ = waiting(config, 0)
    processes[0].send_signal(signal.SIGTERM)
    assert processes[0].wait(timeout=60) == 75
    processes[1].kill()
    assert "before training began" in finish(processes)[0][0]


def test_what_one_cannot_do_ends_all(setup, corpus, tmp_path):  # noqa: F811
    config, run = setup
    other = tmp_path / "other.txt"
    other.write_text((corpus / "text.txt").read_text()[:-50])
    ended = together(config, own={1: [f"data.text={other}"]})
    assert [status for _, _, status in ended] == [3, 3] and "the same training data" in ended[1][1]
    ended = together(config, f"data.val_text={other}", own={1: [f"data.val_text={config}"]})
    assert [status for _, _, status in ended] == [3, 3] and "the same held-out data" in ended[1][1]
    ended = together(config, "train.max_steps=5", failpoint="trainer.nan_grad:3")
    assert [status for _, _, status in ended] == [5, 5]
    ended = together(config, size=3)
    assert [status for _, _, status in ended] == [2, 2, 2] and "multiple of 3" in ended[0][1]
    run.rename(run.parent / "moved")
    run.write_text("in the way")
    ended = together(config)
    assert [status for _, _, status in ended] == [4, 6]


@pytest.mark.parametrize("option", ["optim.shard=true", "train.shard_weights=true"])
def test_an_update_that_one_alone_skips_is_not_saved(setup, option):  # noqa: F811
    config, run = setup
    ended = together(config, RECOMPUTED, option, "train.nonfinite=skip", failpoint="trainer.nan_grad:3", failing=1)
    assert [status for _, _, status in ended] == [6, 6], ended
    assert not list((run / "ckpt").glob("step-*"))


def test_weights_that_come_apart_are_not_saved(setup):  # noqa: F811
    config, run = setup
    ended = together(config, failpoint="trainer.change_weight:6", failing=1)
    assert [status for _, _, status in ended] == [6, 6]
    assert all("weights have come apart" in err for _, err, _ in ended)
    assert [folder.name for folder in (run / "ckpt").glob("step-*")] == ["step-00000004"]


def test_an_environment_that_makes_no_sense(setup):  # noqa: F811
    config, _ = setup
    for variables, message in (({"WORLD_SIZE": "2"}, "RANK is not"), ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'"),
                               ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is 2, but WORLD_SIZE is 2")):
        done = subprocess.run([PROGRAM, config], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "XLSTM_PYTHON": sys.executable, **variables})
        assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize("setting, here, there", [("eval.every", 3, 5), ("train.max_steps", 13, 12),
                                                  ("optim.learning_rate", 0.02, 0.01)])
def test_processes_with_other_settings_do_not_start(setup, setting, here, there):  # noqa: F811
    config, run = setup
    (_, err, status), (_, other_err, other_status) = together(config, own={1: [f"{setting}={here}"]})
    assert status == other_status == 2
    assert "another process of this run has other settings" in err
    assert f"{setting}: {here} here" in other_err and f"{there} in process 0" in other_err
    assert not run.exists()
