"""scripts/check_kernels.py: planted faults are reported, and the kernels of the repository pass. Runs where nvcc is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_kernels.py"
NVCC = shutil.which("nvcc") or (Path("/usr/local/cuda/bin/nvcc").exists() and "/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="nvcc not found")

sys.path.insert(0, str(ROOT / "scripts"))

from kernel_report import checking as check  # noqa: E402
from kernel_report.reading import Kernel, read_report  # noqa: E402

PLANTED = """
#include "cuda/prim/prim.h"
using namespace prim;
struct alignas(16) Four { float x[4]; };

#define GATES(...) KERNEL_FUNCTION(__VA_ARGS__) mlstm_gates
namespace sound {
GATES(256)(Four* p) { Four f = p[thread_idx().x]; f.x[0] += 1; p[thread_idx().x + 256] = f; }
}
namespace spilling {
GATES(256, 4)(float* p) {
  float x[120];
#pragma unroll
  for (int i = 0; i < 120; ++i) x[i] = p[i * 256 + thread_idx().x];
#pragma unroll 1
  for (int round = 0; round < 10; ++round)
#pragma unroll
    for (int i = 0; i < 120; ++i) x[i] = x[i] * x[(i + 1) % 120] + x[(i + 60) % 120];
#pragma unroll
  for (int i = 0; i < 120; ++i) p[i * 256 + thread_idx().x] = x[i];
}
}
namespace local {
GATES(256)(Four* p, const int* index) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[index[i] & 63] = p[i].x[0];
  Four f = p[0];
  f.x[0] = x[index[thread_idx().x] & 63];
  p[thread_idx().x] = f;
}
}
namespace registers {
GATES(256)(float* p) {
  float x[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) x[i] = p[i * 256 + thread_idx().x];
  sync_block();
#pragma unroll
  for (int i = 0; i < 80; ++i) p[i * 256 + thread_idx().x] = x[i] * x[79 - i] + x[(i + 40) % 80];
}
}
namespace shared {
GATES(256)(Four* p) {
  __shared__ Four kept[1280];
  for (int i = 0; i < 5; ++i) kept[thread_idx().x + 256 * i] = p[thread_idx().x + 256 * i];
  sync_block();
  p[thread_idx().x] = kept[1279 - thread_idx().x];
}
}
namespace threads {
GATES(128)(Four* p) { Four f = p[thread_idx().x]; f.x[0] += 1; p[thread_idx().x + 256] = f; }
}
namespace atomics {
GATES(256)(Four* p) {
  atomicAdd(&p[0].x[1], 2.0f);
  Four f = p[thread_idx().x];
  f.x[0] += 1;
  p[thread_idx().x + 256] = f;
}
}
namespace scalar {
GATES(256)(float* p) { p[thread_idx().x] += 1; }
}
namespace stranger {
KERNEL_FUNCTION(256) mystery(float* p) { p[thread_idx().x] += 1; }
}
namespace serialised {
KERNEL_FUNCTION(384, 1) mlstm_early_sm90(float* p, u64 a, u64 b) {
#if PRIM_HAS_SM90A
  float d[32] = {};
  wgmma_fence();
  wgmma_bf16<64, false, false>(d, a, b, true);
  p[thread_idx().x] = d[0];
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) p[i * 384 + thread_idx().x] = d[i];
#endif
}
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """namespace of the planted kernel -> what was reported of it"""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "cuda").mkdir()
    (folder / "cuda" / "planted.cu").write_text(PLANTED)
    (folder / "cuda" / "broken.cu").write_text('#include "cuda/prim/prim.h"\nKERNEL_FUNCTION(32) broken() { return 1; }\n')
    command = [sys.executable, SCRIPT, "--root", folder, "--cache", folder / "cache", "--targets", "sm_80,sm_90a",
               "--json", folder / "report.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    wrong = {}
    for entry in report["kernels"]:
        kernel = Kernel(**entry)
        wrong.setdefault(re.match(r"_ZN\d+([a-z]+?)\d", kernel.symbol)[1], []).extend(
            f"{kernel.target}: {what}" for what in check.check_kernel(kernel))
    return wrong, report, done.stdout


@needs_nvcc
@pytest.mark.parametrize(("name", "pattern"), [
    ("spilling", r"sm_80: \d+ bytes of stack, [1-9]\d* of spill stores, [1-9]\d* of spill loads, must be 0"),
    ("spilling", r"sm_90a: \d+ bytes of stack, [1-9]\d* of spill stores, [1-9]\d* of spill loads, must be 0"),
    ("spilling", r"sm_80: \d+ instructions of the kind local, must be 0"),
    ("local", r"sm_80: [1-9]\d* bytes of stack, 0 of spill stores, 0 of spill loads, must be 0"),
    ("registers", r"sm_80: \d+ registers, at most 64"),
    ("shared", r"sm_80: 20480 bytes of shared memory, at most 16 KiB"),
    ("threads", r"sm_80: launch bounds of 128 threads, the budget says 256"),
    ("atomics", r"sm_80: 1 instructions of the kind float atomics, must be 0"),
    ("scalar", r"sm_80: no STG\.128 instruction"),
    ("stranger", r"sm_80: has no budget in scripts/kernel_report/budgets.py"),
    ("serialised", r"sm_90a: .*\(C75\d\d\).*"),
    ("serialised", r"sm_90a: no UTMALDG instruction"),
])
def test_planted_fault_is_reported(planted, name, pattern):
    wrong, report, printed = planted
    assert [w for w in wrong[name] if re.fullmatch(pattern, w)], wrong[name]
    what = next(w for w in wrong[name] if re.fullmatch(pattern, w)).partition(": ")[2]
    assert any(failure.endswith(what) for failure in report["failures"]) and what in printed


@needs_nvcc
def test_sound_kernel_passes(planted):
    assert planted[0]["sound"] == []


@needs_nvcc
def test_source_that_does_not_compile_is_reported(planted):
    assert any(f.startswith("broken.cu does not compile: ") for f in planted[1]["failures"])


def kernel(**changes):
    values = {"symbol": "_Z1k", "name": "mlstm_gates", "source": "cuda/k.cu", "target": "sm_80", "threads": 256, "registers": 64,
              "instructions": 100, "counts": {"STG.128": 1}}
    return Kernel(**{**values, **changes})


def test_launches_are_checked():
    sound = [("_Z1k", 80, 256, 4096, 1)]
    one = kernel()
    assert check.apply_launches([one], sound) == [] and check.check_kernel(one) == []
    assert one.dynamic_shared == 4096 and one.blocks_per_multiprocessor == 4
    assert "launched with 128 threads" in check.apply_launches([kernel()], [("_Z1k", 80, 128, 0, 1)])[0]
    few = kernel(name="headwise_norm_rows<float,1>", threads=512)  # its budget allows fewer, and not more
    assert check.apply_launches([few], [("_Z1k", 80, 256, 0, 1)]) == []
    assert "launched with 1024 threads" in check.apply_launches([few], [("_Z1k", 80, 1024, 0, 1)])[0]
    assert "compute capability 8.6, which has 99 KiB" in check.apply_launches([kernel()], [("_Z1k", 86, 256, 102400, 1)])[0]
    assert "launches it" in check.apply_launches([kernel()], [])[0]
    wide = kernel()
    check.apply_launches([wide], [("_Z1k", 80, 256, 17000, 1), ("_Z1k", 80, 256, 16, 1)])
    assert check.check_kernel(wide) == ["17000 bytes of shared memory, at most 16 KiB"]


@pytest.mark.parametrize(("registers", "shared", "device", "expected"), [
    (32, 0, 80, 8),  # threads
    (65, 0, 80, 3),  # registers, rounded up to 72
    (32, 40 * 1024, 80, 4),  # shared memory: 41 of 164 KiB
    (128, 113 * 1024, 90, 2),
    (128, 114 * 1024, 90, 1),
    (32, 0, 86, 6),
])
def test_occupancy(registers, shared, device, expected):
    assert check.blocks_per_multiprocessor(kernel(registers=registers, dynamic_shared=shared), device) == expected


@pytest.mark.parametrize(("name", "kind", "count", "expected"), [
    ("mlstm_sweep<dv,64,128,1>", "HMMA", 112, None),  # 32 A S, 16 A B^T, 32 P X, 32 for the state
    ("mlstm_sweep<dv,64,128,1>", "HMMA", 111, "112 to 140"),
    ("mlstm_sweep<dv,64,128,1>", "HMMA", 141, "112 to 140"),
    ("mlstm_sweep<h,64,64,2>", "HMMA", 192, None),  # three products of 64
    ("mlstm_sweep_sm90<h,128,64>", "HGMMA", 100, None),
    ("mlstm_sweep_sm90<h,128,64>", "HGMMA", 101, "100 to 100"),
    ("mlstm_state<2>", "HMMA", 64, "96 to 96"),
])
def test_matrix_instructions_are_counted(name, kind, count, expected):
    wrong = [w for w in check.check_kernel(kernel(name=name, target="sm_90a", counts={kind: count})) if "expected" in w]
    assert wrong == ([] if expected is None else [f"{count} {kind} instructions, expected {expected}"])


def test_too_few_blocks_are_reported():
    one = kernel(registers=60)
    one.blocks_per_multiprocessor = 3
    assert check.check_kernel(one) == ["3 blocks fit a multiprocessor, at least 4 must"]


def test_assembler_messages_reach_their_kernel():
    ptx = ".visible .entry a(\n.param .u64 p\n)\n.maxntid 256\n{}\n.visible .entry b(\n)\n.maxntid 128\n{}"
    report = """ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized in function 'a'
ptxas info    : Used 30 registers, used 1 barriers, 32 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 31 registers
"""
    a, b = read_report(report, ptx, "sm_90a", "x.cu")
    assert (a.threads, a.registers, a.static_shared, len(a.messages)) == (256, 30, 32, 1)
    assert (b.threads, b.registers, b.stack, b.spill_stores, b.spill_loads, b.messages) == (128, 31, 16, 4, 8, [])
    for line in ("ptxas warning : something of a", "ptxas info : (C7519) wgmma of b"):
        assert sum(len(k.messages) for k in read_report(report + line, ptx, "sm_90a", "x.cu")) > 1


@needs_nvcc
def test_kernels_of_the_repository_pass(tmp_path):
    """Every kernel for every target that nvcc knows."""
    done = subprocess.run([sys.executable, SCRIPT, "--json", tmp_path / "kernels.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {"sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120"} <= set(report["targets"])
    assert {k["target"] for k in report["kernels"]} == set(report["targets"])
