"""kill -9 and signals: the same command goes on, and ends in the same bits as a run that nothing happened to."""

import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import FULL
from tiny_run import BIN, SAVE_EVERY, TinyRun, environment, program, stop

RANDOM_KILLS = 15 if FULL else 2
# Each dies in the save of step 50 (the pruning after it deletes step 20), at most once per run.
FAILPOINTS = ["ckpt.after_mkdir:50", "ckpt.write:0,ckpt.write_step:50", "ckpt.write:{bytes},ckpt.write_step:50",
              "ckpt.before_sync:50", "ckpt.before_rename:50", "ckpt.after_rename:50", "ckpt.prune:20"]


def finish_and_compare(run, reference):
    committed = run.checkpoints()
    done = run.train(check=0)
    if committed:
        assert "resumed from" in done.stdout, f"started anew with {committed[-1].name} present:\n{done.stdout}\n{done.stderr}"
    assert run.fingerprint() == reference.fingerprint
    folders = sorted(p.name for p in (run.path / "ckpt").iterdir())
    assert folders == sorted(p.name for p in (reference.run.path / "ckpt").iterdir()), "left-overs of the crash"


@pytest.mark.parametrize("case", range(RANDOM_KILLS))
def test_kill_at_a_random_moment(case, tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    delay = rng.uniform(0.8 * reference.seconds_to_step_1, reference.seconds)
    process = run.start()
    time.sleep(delay)
    stop(process)
    print(f"killed after {delay:.3f} s, step {run.last_step()}")
    finish_and_compare(run, reference)


@pytest.mark.parametrize("failpoint", FAILPOINTS if FULL else [FAILPOINTS[2], FAILPOINTS[4]])
def test_kill_inside_a_save(failpoint, tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    total = sum(p.stat().st_size for p in reference.run.checkpoints()[-1].iterdir())
    failpoint = failpoint.format(bytes=rng.randrange(total))
    print(failpoint)
    done = run.train(XLSTM_FAILPOINT=failpoint)
    assert done.returncode == -signal.SIGKILL, f"{failpoint} was not reached:\n{done.stdout}\n{done.stderr}"
    newest = run.checkpoints()[-1].name
    assert newest == ("step-00000050" if failpoint.split(":")[0] in ("ckpt.after_rename", "ckpt.prune")
                      else "step-00000040")
    program("xlstm-generate", run.path, "--prompt", "x", "--max-new-tokens", 1, check=0)
    finish_and_compare(run, reference)


def test_kills_while_the_best_checkpoint_is_named(tmp_path, shared, rng):
    """It is saved, and ckpt/best still names the one before, which must not be lost either."""
    settings = ["ckpt.keep_best=true", "ckpt.keep_last=1", "eval.every=7"]
    whole, run = TinyRun(tmp_path / "whole", shared), TinyRun(tmp_path / "killed", shared)
    whole.train(*settings, check=0)
    lowest, bests = float("inf"), []
    for line in whole.metrics():
        if line.get("val/loss", lowest) < lowest:
            lowest = line["val/loss"]
            bests.append(line["step"])
    assert len(bests) > 3
    for step in sorted(rng.sample(bests[1:], len(bests) - 1 if FULL else 2)):
        before = bests[bests.index(step) - 1]
        done = run.train(*settings, XLSTM_FAILPOINT=f"ckpt.best:{step}")
        assert done.returncode == -signal.SIGKILL, f"step {step} was not reached:\n{done.stdout}\n{done.stderr}"
        assert (run.path / "ckpt" / "best").readlink().name == f"step-{before:08d}"
        program("xlstm-generate", run.path / "ckpt" / "best", "--prompt", "x", "--max-new-tokens", 1, check=0)
    run.train(*settings, check=0)
    assert run.fingerprint() == whole.fingerprint()
    names, links = zip(*((sorted(p.name for p in (r.path / "ckpt").iterdir()), (r.path / "ckpt" / "best").readlink())
                         for r in (run, whole)), strict=True)
    assert names[0] == names[1] and links[0] == links[1] and links[0].name == f"step-{bests[-1]:08d}"


def test_many_kills_in_one_run(tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    kills, wanted = 0, 20 if FULL else 3
    while kills < wanted:
        resumed_from = max((int(p.name[5:]) for p in run.checkpoints()), default=0)
        target = max(run.last_step() + 1, resumed_from + rng.randint(1, 2 * SAVE_EVERY))
        assert target < run.steps
        process = run.start()
        run.wait_for_step(process, target)
        time.sleep(rng.uniform(0, 0.03))
        stop(process)
        kills += 1
    print(f"{kills} kills, last at step {run.last_step()}")
    finish_and_compare(run, reference)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"] if FULL else ["SIGTERM", "SIGINT"])
def test_signal_saves_and_exits_75(name, tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    process = run.start()
    try:
        run.wait_for_step(process, rng.randint(5, 60))
        begin = time.time()
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=30) == 75, run.output()
        print(f"{name}: saved and stopped in {time.time() - begin:.3f} s")
    finally:
        stop(process)
    step = run.last_step()
    assert run.checkpoints()[-1].name == f"step-{step:08d}"
    assert [m for m in run.metrics() if m.get("event") == "resume"] == []
    run.train(check=0)
    resumed = [m for m in run.metrics() if m.get("event") == "resume"]
    assert [m["step"] for m in resumed] == [step], "no step is done twice"
    assert run.fingerprint() == reference.fingerprint


def test_second_interrupt_exits_at_once(tmp_path, shared, reference):
    run = TinyRun(tmp_path, shared)
    process = run.start("train.max_steps=1000000", "train.global_batch_size=2048", "train.micro_batch_size=2048")
    try:
        end = time.time() + 60
        while not (run.path / "metrics.jsonl").exists() and time.time() < end:
            time.sleep(0.01)
        time.sleep(0.5)  # inside a long step
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        begin = time.time()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (130, 75)
        assert time.time() - begin < 2
    finally:
        stop(process)


def test_closed_output_does_not_stop_a_run(tmp_path, shared, reference):
    run = TinyRun(tmp_path, shared)
    process = subprocess.Popen([BIN / "xlstm-train", run.config], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment())
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert run.fingerprint() == reference.fingerprint


def test_second_trainer_on_a_run_folder_is_refused(tmp_path, shared, reference):
    run = TinyRun(tmp_path, shared)
    process = run.start()
    try:
        run.wait_for_step(process, 1)
        process.send_signal(signal.SIGSTOP)  # it must not be done before the second one has looked
        second = run.train()
        process.send_signal(signal.SIGCONT)
        assert second.returncode == 4, second.stderr
        assert str(process.pid) in second.stderr and str(run.path) in second.stderr
        assert process.wait(timeout=120) == 0, run.output()
    finally:
        stop(process)
    assert run.fingerprint() == reference.fingerprint


@pytest.mark.skipif(not FULL, reason="part of the full fault suite (XLSTM_FAULTS=full)")
def test_order_of_writes_and_syncs(tmp_path, shared):
    """A power cut cannot be tested by a kill, its precondition can: everything a manifest lists is synced before the
    rename that commits it, and the rename is synced before the run goes on."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run = TinyRun(tmp_path, shared, steps=20)
    trace = tmp_path / "trace"
    done = subprocess.run(["strace", "-f", "-y", "-o", trace, "-e", "trace=openat,fsync,rename,write",
                           BIN / "xlstm-train", run.config], env=environment(), capture_output=True, text=True)
    if done.returncode != 0 and "ptrace" in done.stderr.lower():
        pytest.skip("ptrace is not permitted here")
    assert done.returncode == 0, done.stderr
    dirty, commits, waiting = set(), 0, None
    for line in trace.read_text(errors="replace").splitlines():
        file = re.search(r"(?:write|fsync)\(\d+<([^>]*)>", line)
        path = file.group(1) if file else ""
        if waiting and "fsync(" in line and path == waiting:
            waiting = None
        if "/ckpt/step-" in path:
            (dirty.discard if "fsync(" in line else dirty.add)(path)
        rename = re.search(r'rename\("([^"]*/ckpt/step-\d+)/MANIFEST.json.tmp"', line)
        if rename:
            folder = rename.group(1)
            assert not dirty, f"committed before a sync of {dirty}"
            commits += 1
            waiting = str((tmp_path / folder).resolve())
    assert commits == 20 // SAVE_EVERY
    assert waiting is None, "the rename was never synced"
