"""Runs whose weights, or whose sequences, several processes have divided among them: the same as whole ones."""

import json
import os
import re
import subprocess
import sys

import pytest
from test_distributed import RECOMPUTED, TWO_MICRO_BATCHES, finish, start, together, wait_for_step
from test_train import PROGRAM, corpus, fingerprint, losses, records, setup, train  # noqa: F401

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")

DIVIDED = "train.shard_weights=true"  # what of the norm is summed where differs: without clipping no bit does
UNCLIPPED = "train.grad_clip=0"


@pytest.mark.parametrize("options", [[], ["train.dtype=bfloat16", "train.carry_state=true", "model.dropout=0.1"]])
def test_divided_weights_have_the_same_bits(setup, options):  # noqa: F811
    config, run = setup
    options = [*options, RECOMPUTED, UNCLIPPED, "sample.every=6"]
    for name, more in (("whole", []), ("divided", [DIVIDED])):
        ended = together(config, *options, *more, f"run.name={name}")
        assert [status for _, _, status in ended] == [0, 0], ended
        assert ("weights in parts" in ended[0][0]) == bool(more)
    whole, divided = run.parent / "whole", run.parent / "divided"
    assert losses(divided) == losses(whole) and len(losses(divided)) == 12
    for step in (8, 12):
        assert fingerprint(divided, step) == fingerprint(whole, step)
    held_out = [[r["val/loss"] for r in records(folder) if "val/loss" in r] for folder in (divided, whole)]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 3
    assert records(divided, "samples.jsonl") == records(whole, "samples.jsonl")


def test_weights_divided_among_four_differ_by_rounding_alone(setup):  # noqa: F811
    config, run = setup
    assert train(config, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, RECOMPUTED, DIVIDED, size=4)] == [0] * 4
    here, alone = (records(folder) for folder in (run, run.parent / "alone"))
    for number in ("train/loss", "train/grad_norm", "val/loss"):
        values = [[r[number] for r in of if number in r] for of in (here, alone)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-4)


def test_who_divides_the_weights_may_change_from_start_to_start(setup):  # noqa: F811
    config, run = setup
    options, stop = [RECOMPUTED, UNCLIPPED, TWO_MICRO_BATCHES], "trainer.raise_sigterm:{}"
    assert train(config, *options, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, *options, DIVIDED, failpoint=stop.format(3))] == [75, 75]
    assert train(config, *options, DIVIDED, failpoint=stop.format(5)).returncode == 75
    assert [status for _, _, status in together(config, *options, DIVIDED, failpoint=stop.format(7))] == [75, 75]
    assert [status for _, _, status in together(config, *options, failpoint=stop.format(9))] == [75, 75]
    ended = together(config, *options, DIVIDED, failpoint="ckpt.before_rename:12", failing=0)
    assert ended[0][2] < 0 and ended[1][2] == 6, ended
    assert [status for _, _, status in together(config, *options, DIVIDED)] == [0, 0]
    assert losses(run) == losses(run.parent / "alone")
    assert fingerprint(run, 12) == fingerprint(run.parent / "alone", 12)


def test_divided_weights_that_begin_with_given_ones(setup):  # noqa: F811
    config, run = setup
    assert train(config, "run.name=given", "train.max_steps=4").returncode == 0
    options = [RECOMPUTED, UNCLIPPED, f"train.init_from={run.parent / 'given'}", "train.max_steps=4"]
    assert train(config, *options, TWO_MICRO_BATCHES, "run.name=alone").returncode == 0
    assert [status for _, _, status in together(config, *options, DIVIDED)] == [0, 0]
    assert fingerprint(run, 4) == fingerprint(run.parent / "alone", 4)


def test_what_divided_weights_take(setup):  # noqa: F811
    config, _ = setup
    env = {**os.environ, "XLSTM_PYTHON": sys.executable, "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}

    def memory(*options, env=env):
        command = [PROGRAM, config, "model.embedding_dim=256", "model.num_blocks=12", RECOMPUTED, *options, "--dry-run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("  weights"))
        numbers = re.findall(r"(weights|gradients|optimizer|at least) ([\d.]+) MiB", line)
        return {name: float(number) for name, number in numbers}, done.stdout

    whole, _ = memory()
    optimizer, _ = memory("optim.shard=true")
    divided, out = memory(DIVIDED)
    assert "in each of 4 processes" in out and "one step    not run: it takes all processes" in out
    assert optimizer == {**whole, "optimizer": pytest.approx(whole["optimizer"] / 4, abs=0.1)}
    assert divided["optimizer"] == optimizer["optimizer"]
    for name in ("weights", "gradients"):
        assert whole[name] / 4 < divided[name] < whole[name] / 2
    assert whole["weights"] * 0.9 < divided["at least"] < whole["weights"]
    alone, out = memory(DIVIDED, env={**env, "WORLD_SIZE": "1"})
    assert alone == whole and "several processes divide all but the activations" in out
    for options, message in ((["model.activation_checkpointing=false"], "set model.activation_checkpointing=true"),
                             (["model.lora.rank=2", "train.init_from=x"], "the weights beside adapters stay whole")):
        done = train(config, RECOMPUTED, DIVIDED, *options)
        assert done.returncode == 2 and "train.shard_weights" in done.stderr and message in done.stderr, done.stderr


def numbers(run, *names):
    return [[r[name] for r in records(run) if name in r] for name in names]


@pytest.mark.parametrize("options, size", [([], 2), (["train.micro_batch_size=1", RECOMPUTED, "optim.shard=true"], 4)])
def test_segments_of_sequences_differ_from_whole_ones_by_rounding_alone(setup, options, size):  # noqa: F811
    config, run = setup
    assert train(config, "run.name=alone").returncode == 0
    ended = together(config, "train.sequence_parallel=2", *options, size=size)
    assert [status for _, _, status in ended] == [0] * size, ended
    assert "segments of 8 tokens" in ended[0][0]
    measured = "train/loss", "train/grad_norm", "val/loss"
    for here, alone in zip(numbers(run, *measured), numbers(run.parent / "alone", *measured), strict=True):
        assert here and here == pytest.approx(alone, rel=1e-4)


def test_who_computes_segments_may_change_from_start_to_start(setup):  # noqa: F811
    config, run = setup
    assert train(config, "run.name=alone").returncode == 0
    segments, stop = "train.sequence_parallel={}", "trainer.raise_sigterm:{}"
    assert [status for _, _, status in together(config, segments.format(2), failpoint=stop.format(3))] == [75, 75]
    assert train(config, failpoint=stop.format(5)).returncode == 75
    assert [status for _, _, status in together(config, segments.format(4), size=4, failpoint=stop.format(8))] == [75] * 4
    assert [status for _, _, status in together(config)] == [0, 0]
    here, alone = (numbers(folder, "train/loss") for folder in (run, run.parent / "alone"))
    assert len(here[0]) == 12 and here[0] == pytest.approx(alone[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["xlstm", "rwkv4"])
def test_segments_of_real_vectors_in_bfloat16(setup, kind):  # noqa: F811
    config, run = setup
    task = ["data.text=", "data.task.name=nns", "model.input_features=3", "model.vocab_size=1", "sample.prompts=[]",
            "train.dtype=bfloat16", f"model.kind={kind}", f"model.slstm_at={[0] if kind == 'xlstm' else []}"]
    assert train(config, *task, "run.name=alone").returncode == 0
    ended = together(config, *task, "train.sequence_parallel=2")
    assert [status for _, _, status in ended] == [0, 0], ended
    here, alone = (numbers(folder, "train/loss") for folder in (run, run.parent / "alone"))
    assert len(here[0]) == 12 and here[0][:2] == pytest.approx(alone[0][:2], rel=1e-5)
    assert here[0] == pytest.approx(alone[0], rel=2e-2)  # what bfloat16 rounds otherwise has been learnt from by then


def test_adapters_of_segments(setup):  # noqa: F811
    config, run = setup
    base = ["model.embedding_dim=64", "model.slstm_at=[0]"]  # whose state depends on nothing that is trained
    assert train(config, *base, "run.name=given", "train.max_steps=2").returncode == 0
    adapters = [*base, "model.lora.rank=2", f"train.init_from={run.parent / 'given'}"]
    assert train(config, *adapters, "run.name=alone").returncode == 0
    ended = together(config, *adapters, "train.sequence_parallel=2")
    assert [status for _, _, status in ended] == [0, 0], ended
    for here, alone in zip(numbers(run, "train/loss"), numbers(run.parent / "alone", "train/loss"), strict=True):
        assert here and here == pytest.approx(alone, rel=1e-4)


def test_segments_without_a_target(setup, tmp_path):  # noqa: F811
    config, run = setup
    lines = [json.dumps({"prompt": "a long question " * 4, "answer": f" {i * i}"}) for i in range(200)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    options = [f"data.text={tmp_path / 'chat.jsonl'}", "data.prompt_key=prompt", "data.text_key=answer",
               "train.global_batch_size=1", "sample.prompts=[]"]
    assert train(config, *options, "run.name=alone").returncode == 0
    ended = together(config, *options, "train.sequence_parallel=4", size=4)
    assert [status for _, _, status in ended] == [0] * 4, ended
    for here, alone in zip(numbers(run, "train/loss"), numbers(run.parent / "alone", "train/loss"), strict=True):
        assert here == pytest.approx(alone, rel=1e-4)


def test_segments_in_bfloat16_with_dropout(setup):  # noqa: F811
    config, run = setup
    options = ["train.sequence_parallel=2", "train.dtype=bfloat16", "model.dropout=0.1"]
    assert [status for _, _, status in together(config, *options)] == [0, 0]
    options.append("run.name=again")
    assert [status for _, _, status in together(config, *options, failpoint="trainer.raise_sigterm:6")] == [75, 75]
    assert [status for _, _, status in together(config, *options)] == [0, 0]
    assert losses(run) == losses(run.parent / "again")


def test_one_of_those_that_share_a_sequence_is_killed(setup):  # noqa: F811
    config, run = setup
    processes = start(config, "train.sequence_parallel=2", "train.max_steps=100000")
    wait_for_step(run, 8)
    processes[1].kill()
    ended = finish(processes)
    assert ended[0][2] == 6 and "process 0 of 2: another process failed" in ended[0][1], ended


def test_what_segments_need(setup):  # noqa: F811
    config, _ = setup
    for options, message in ((["train.sequence_parallel=3"], "expected a divisor of data.seq_len 16"),
                             (["train.sequence_parallel=2"], "start them by torchrun"),
                             (["train.sequence_parallel=2", "train.carry_state=true"], "the state behind a sequence"),
                             (["train.sequence_parallel=2", RECOMPUTED, DIVIDED], "cannot collect the weights"),
                             (["train.sequence_parallel=2", "model.kind=llama", "model.slstm_at=[]"], "state grows")):
        done = train(config, *options)
        assert done.returncode == 2 and "train.sequence_parallel" in done.stderr and message in done.stderr, done.stderr
    for processes, message in ((3, "but there are 3 processes"), (16, "cannot be shared by 8 times 2 processes")):
        done = subprocess.run([PROGRAM, config, "train.sequence_parallel=2", "--dry-run"], capture_output=True, text=True,
                              env={**os.environ, "WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}, timeout=60)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    activations = []
    env = {**os.environ, "XLSTM_PYTHON": sys.executable, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for options in ([], ["train.sequence_parallel=2"]):
        done = subprocess.run([PROGRAM, config, *options, "--dry-run"], capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0 and ("one step    not run" in done.stdout) == bool(options), done.stderr
        batch = re.search(r"micro batches of (\d+)", done.stdout)[1]
        activations.append((batch, re.search(r"activations ([\d.]+ MiB)", done.stdout)[1]))
    assert activations[0][1] == activations[1][1]  # twice the sequences, half of each
    assert [batch for batch, _ in activations] == ["2", "4"]
