"""python -m libxlstm.doctor: what it says of this machine, and of ones where something is wrong."""

import subprocess
import sys

import pytest
import torch

import libxlstm
from libxlstm import doctor


@pytest.fixture
def run(capsys):
    def call():
        status = doctor.main()
        return status, capsys.readouterr().out

    return call


def test_this_machine():
    done = subprocess.run([sys.executable, "-m", "libxlstm.doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"libxlstm    {libxlstm.__version__}, ") and lines[-1] == "no problem found"
    assert f"torch       {torch.__version__}, " in done.stdout
    for cell in ("mlstm", "slstm"):
        for dtype in ("float32", "bfloat16"):
            assert f"check       {cell} {dtype} on cpu: within " in done.stdout


def test_a_wrong_gradient_is_found(run, monkeypatch):
    right = doctor.slstm

    def wrong(wx, r, b):
        y = right(wx, r, b)
        return y if y.dtype == torch.float64 else y + 0.01 * (b - b.detach()).sum()

    monkeypatch.setattr(doctor, "slstm", wrong)
    status, out = run()
    assert status == 1 and "PROBLEM: wrong float32 on cpu: " in out and "problems: " in out.splitlines()[-1]


def test_programs_that_do_not_run(run, monkeypatch):
    real = doctor.first_line_of
    monkeypatch.setattr(doctor, "first_line_of",
                        lambda program, *rest: None if "xlstm-eval" in str(program) else real(program, *rest))
    status, out = run()
    if "programs    none" in out:
        pytest.skip("no programs are built")
    assert status == 1 and "programs    PROBLEM: xlstm-eval in " in out


def test_a_gpu_that_torch_does_not_see(run, monkeypatch):
    real = doctor.first_line_of
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "first_line_of",
                        lambda program, *rest: "GPU 0: NVIDIA H100" if program == "nvidia-smi" else real(program, *rest))
    for version, reason in (("13.0", "does not see it"), (None, "built without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", version)
        status, out = run()
        assert status == 1 and "gpu         PROBLEM: GPU 0: NVIDIA H100" in out and reason in out
