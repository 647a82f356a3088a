"""Disks that are full or refuse: training goes on with the last good checkpoint."""

import resource
import shutil
import subprocess

import pytest
from conftest import FULL
from tiny_run import BIN, TinyRun, environment, program, stop


def test_saves_that_fail_for_a_while(tmp_path, shared, reference):
    """The limit on file sizes is set on the running trainer: the model no longer fits into a file, logs still do."""
    run = TinyRun(tmp_path, shared)
    process = run.start("ckpt.max_failed_saves=100")
    try:
        run.wait_for_step(process, 21)
        old = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        begin = run.last_step()
        run.wait_for_step(process, begin + 30)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, old)
        assert process.wait(timeout=120) == 0, run.output()
    finally:
        stop(process)
    assert "model.safetensors" in run.output() and "File too large" in run.output()
    assert max(m.get("ckpt/failed", 0) for m in run.metrics()) >= 2
    assert run.fingerprint() == reference.fingerprint


def test_too_many_failed_saves_stop_the_run_with_4(tmp_path, shared):
    run = TinyRun(tmp_path, shared)
    process = run.start("ckpt.max_failed_saves=2", "train.max_steps=100000")
    try:
        run.wait_for_step(process, 21)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        assert process.wait(timeout=120) == 4, run.output()
    finally:
        stop(process)
    folders = {p.name for p in (run.path / "ckpt").iterdir()}
    assert folders == {p.name for p in run.checkpoints()}, "nothing half-written stays"
    program("xlstm-generate", run.path, "--prompt", "x", "--max-new-tokens", 1, check=0)


@pytest.mark.parametrize("slack", [0.5, 1.02] if FULL else [0.5])
def test_full_disk(slack, tmp_path, shared, reference):
    """A tmpfs with room for two checkpoints and a bit: the third save fails, the run ends, two good ones are there."""
    run = TinyRun(tmp_path, shared)
    size = sum(p.stat().st_size for p in reference.run.checkpoints()[-1].iterdir())
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    room = int(size * (2 + slack)) + 150_000
    script = (f'mount -t tmpfs -o size={room} tmpfs "{disk}" || exit 99; "$@"; code=$?; '
              f'cp -r "{disk}" "{copy}"; exit $code')
    command = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("no private mounts here")
    shutil.rmtree(copy)
    done = subprocess.run([*command, BIN / "xlstm-train", run.config, f"run.out_dir={disk}", "ckpt.max_failed_saves=3"],
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 4, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    assert str(disk) in done.stderr
    run.path = copy / "tiny"
    good = run.checkpoints()
    assert good and {p.name for p in (run.path / "ckpt").iterdir()} == {p.name for p in good}
    assert run.last_step() >= int(good[-1].name[5:]) + 20, "training went on between failed saves"
    for folder in good:
        program("xlstm-generate", folder, "--prompt", "x", "--max-new-tokens", 1, check=0)
