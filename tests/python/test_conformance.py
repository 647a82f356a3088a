"""tests/cuda: every primitive has a case; what the comparison of device and emulator reports; the device's program compiles where nvcc is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "cuda"
NVCC = shutil.which("nvcc") or (Path("/usr/local/cuda/bin/nvcc").exists() and "/usr/local/cuda/bin/nvcc")

GOOD = """CASE shuffles exact 3 1 ff 3f800000
CASE ex2 near 1e-06 1e-05 4 1 2.5 inf nan
INFO probe_arrival 0 of 3 wrong
SKIP wgmma needs sm_90a
END 4
"""
HOST = GOOD.replace("SKIP wgmma needs sm_90a", "CASE wgmma exact 1 7").replace("INFO probe_arrival 0 of 3 wrong\nSKIP", "SKIP")
HOST = HOST.replace("INFO probe_arrival 0 of 3 wrong", "SKIP probe_arrival hardware alone")


def compare(tmp_path, device, host=HOST, *options):
    (tmp_path / "device.txt").write_text(device)
    (tmp_path / "host.txt").write_text(host)
    done = subprocess.run([sys.executable, FOLDER / "compare_conformance.py", tmp_path / "device.txt",
                           tmp_path / "host.txt", *options], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_same(tmp_path):
    code, text = compare(tmp_path, GOOD, HOST, "--all")
    assert code == 0 and "3 cases: 2 PASS, 0 FAIL, 1 SKIP" in text
    assert "0 of 3 wrong" in text and "needs sm_90a" in text and "PASS ex2" in text


def test_within_the_tolerance(tmp_path):
    assert compare(tmp_path, GOOD.replace("2.5", "2.50002"))[0] == 0


@pytest.mark.parametrize(("old", "new", "said"), [
    ("3f800000", "3f800001", "1 of 3 differ: [2]"),
    ("1 2.5 inf", "1 2.5001 inf", "1 of 4 differ: [1] 2.5001 instead of 2.5"),
    ("inf nan", "1e38 nan", "1 of 4 differ"),
    ("inf nan", "inf 3", "1 of 4 differ"),
    ("inf nan", "nan nan", "1 of 4 differ"),
    ("CASE ex2 near 1e-06 1e-05 4 1 2.5 inf nan", "ERROR ex2 hung", "device: hung"),
    ("CASE ex2 near 1e-06 1e-05 4 1 2.5 inf nan", "CASE ex2 near 1e-06 1e-05 4 1 2.5\nERROR ex2 hung", "device: hung"),
    ("CASE ex2 near 1e-06 1e-05 4", "CASE ex2 near 1e-06 1e-05 5", "damaged"),
    ("CASE ex2 near 1e-06 1e-05", "CASE ex2 near 1 1", "different versions"),
    ("CASE ex2", "CASE ex3", "missing on the device"),
    ("CASE ex2 near 1e-06 1e-05 4 1 2.5 inf nan\n", "", "3 cases of 4"),
    ("END 4\n", "", "no END"),
])
def test_reported(tmp_path, old, new, said):
    assert old in GOOD
    code, text = compare(tmp_path, GOOD.replace(old, new))
    assert code == 1 and said in text, text


def test_nothing_compared(tmp_path):
    skipped = "SKIP a not here\nEND 1\n"
    assert compare(tmp_path, skipped, "CASE a exact 1 1\nEND 1\n")[0] == 1


def test_every_primitive_has_a_case():
    host = "".join((ROOT / "cuda" / "prim" / name).read_text() for name in ("host.h", "host_sm90.h"))
    declared = set(re.findall(r"^(?:inline |constexpr )*(?:void|bool|u16|u32|float|Dim3|unsigned char\*) (\w+)\(", host, re.M))
    # Of the host alone: what the primitives are made of.
    helpers = {"flushed", "ldmatrix", "stmatrix", "cp_async_wait_pending", "tma_load", "tma_store", "tma_store_wait_pending",
               "wgmma", "wgmma_wait_pending", "wgmma_columns", "fence_registers", "change_max_registers"}
    cases = "".join(path.read_text() for path in FOLDER.iterdir() if path.suffix in (".cu", ".h"))
    missing = {name for name in declared - helpers if not re.search(rf"prim::{name}\b", cases)}
    assert len(declared) > 70 and not missing


@pytest.mark.skipif(not NVCC, reason="nvcc not found")
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_compiles(target, tmp_path):
    sources = sorted(FOLDER.glob("*.cu"))
    assert len(sources) > 5
    for source in sources:
        done = subprocess.run([NVCC, "-std=c++17", "-O1", f"-I{ROOT}", "-cubin", f"-arch={target}", "-Xptxas", "-O1",
                               "-o", tmp_path / "out.cubin", source], capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
