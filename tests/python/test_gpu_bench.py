"""scripts/bench/gpu_mlstm.py and scripts/gpu_check.sh, as far as they run without a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    import gpu_mlstm

    yield gpu_mlstm
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def tiny(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    status = bench.main(["--device", "cpu", "--tiny", "--out", str(folder)])
    torch.set_num_threads(threads)
    return status, json.loads((folder / "gpu_mlstm.json").read_text()), folder


def test_tiny_run(tiny):
    status, report, folder = tiny
    assert status == 0 and report["bad"] == [] and report["skipped"] == []
    assert {"date", "device", "torch"} <= set(report["machine"])
    assert report["limits"]["copy"]["gb_per_s"] > 0 and report["limits"]["product"]["tflop_per_s"] > 0
    assert (folder / "gpu_mlstm.png").stat().st_size > 1000
    ours = {c["operator"]: c["errors"] for c in report["checks"] if c["operator"].startswith("libxlstm")}
    assert len(ours) == 3
    assert all(set(errors) == {"h", "dq", "dk", "dv", "digate", "dfgate"} for errors in ours.values())


def test_every_time_is_one_that_was_measured(tiny):
    for row in tiny[1]["cases"]:
        assert {"libxlstm", "mlstm_kernels native"} <= set(row["times"])
        for result in row["times"].values():
            for name in ("forward", "backward", "both"):
                low, high = result[name]["quartiles_ms"]
                assert 0 < low <= result[name]["median_ms"] <= high
                assert result[name]["calls"] >= 5 and result[name]["method"] == "eager calls"
        peer, mine = row["times"]["mlstm_kernels native"], row["times"]["libxlstm"]
        ratio = row["ratios"]["mlstm_kernels native"]
        assert ratio["ours"] == "libxlstm"
        assert ratio["both"] == pytest.approx(peer["both"]["median_ms"] / mine["both"]["median_ms"])
        assert peer["chunk_size"] in (32, 64) and set(peer["scan_both_ms"]) == {"32", "64"}
    steps = tiny[1]["steps"]
    assert steps["bad"] == [] and len(steps["cases"]) == 2
    assert all(r["median_ms"] > 0 for row in steps["cases"] for r in row["times"].values())
    assert all({"libxlstm", "libxlstm, lazy"} <= set(row["times"]) for row in steps["cases"])
    assert set(steps["errors"]["libxlstm, lazy"]) == {"h", "c", "n"}


def test_rings_at_every_fill(bench):
    """A timed lazy step folds its share of the heads, however many there are."""
    for heads, counts in ((32, [2] * 16), (8, [1, 0] * 8)):
        *_, count = bench.ring_of(torch.zeros(1, heads, 3), torch.zeros(1, heads, 5), spread=True)
        assert torch.bincount(count.flatten(), minlength=16).tolist() == counts
    assert not bench.ring_of(torch.zeros(1, 8, 3), torch.zeros(1, 8, 5))[3].any()


def test_nothing_is_timed_where_ours_is_wrong(bench, tmp_path, monkeypatch):
    right = bench.load_ours

    def wrong(*arguments):
        operators = right(*arguments)
        function = operators[0].function
        operators[0].function = lambda q, k, v, i, f: function(q, k, v, i, f + 0.01)
        return operators

    monkeypatch.setattr(bench, "load_ours", wrong)
    assert bench.main(["--device", "cpu", "--tiny", "--no-peers", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu_mlstm.json").read_text())
    assert report["cases"] == [] and "steps" not in report
    assert report["bad"] and all(line.startswith("libxlstm (16,") for line in report["bad"])


def test_failure_of_ours_is_reported(bench, tmp_path, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(bench, "passes", failing)
    assert bench.main(["--device", "cpu", "--tiny", "--no-peers", "--suites", "standard", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu_mlstm.json").read_text())
    assert "planted" in report["bad"][0]


def test_work_counts(bench):
    """The standard size (128,256): 4*128*256 for the state, 2*96*(2*128) scores, 2*96*256 values; backward likewise."""
    forward, backward = bench.work(bench.Case("standard", 1, 1, 1, 128, 256))
    assert forward == (131072 + 49152 + 49152, 1536)
    assert backward == (229376 + 2 * (131072 + 49152 + 24576), 3 * 1536 + 256)


def test_reference_is_the_recurrence(bench):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, d, dtype=torch.float64) for d in (4, 4, 6))
    i, f = (torch.randn(1, 9, 2, dtype=torch.float64) for _ in range(2))
    c, n = torch.zeros(1, 2, 4, 6, dtype=torch.float64), torch.zeros(1, 2, 4, dtype=torch.float64)
    h = []
    for t in range(9):  # unstabilised: e^m times the stabilised state; the eps of the reference is then eps e^m
        keep, take = torch.sigmoid(f[:, t]), torch.exp(i[:, t])
        c = keep[..., None, None] * c + take[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = keep[..., None] * n + take[..., None] * k[:, t]
        query = q[:, t] / 2
        norm = (query * n).sum(-1).abs().clamp(min=1)
        h.append((query[..., None] * c).sum(-2) / norm[..., None])
    assert bench.relative_error(torch.stack(h, 1), bench.reference(q, k, v, i, f, "exp")) < 1e-4
    assert bench.relative_error(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_scripts_say_so(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "gpu_mlstm.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stderr
    done = subprocess.run([ROOT / "scripts" / "gpu_check.sh"], capture_output=True, text=True,
                          env={**os.environ, "OUT": str(tmp_path)})
    assert done.returncode == 2 and "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_gpu_check_refuses_unknown_parts():
    for arguments in (["--only", "conformance,nonsense"], ["--only"], ["--fast"]):
        done = subprocess.run([ROOT / "scripts" / "gpu_check.sh", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


FAKE_PYTHON = """#!/bin/bash
if [ "$1" = - ]; then
  script=$(mktemp); cat >"$script"; shift
  if grep -q is_available "$script"; then echo '90 {{"device": "A GPU"}}'; exit 0; fi
  {real} "$script" "$@"; exit $?
fi
printf '%s|%s|%s|%s\\n' "$*" "${{XLSTM_HOPPER:-}}" "${{PYTHONPATH%%:*}}" "${{PYTORCH_NO_CUDA_MEMORY_CACHING:-}}" >>{calls}
for name in mlstm mlstm_step_inputs slstm gated_linear_attention causal_conv1d headwise_norm residual_norm block_linear \\
  linear_int8 linear_cross_entropy; do
  [ "$2 $name" = "{generic}" ] || echo "$name: kernels for CUDA"
done
case "$*" in {hanging}) until [ -e {calls}.go_on ]; do sleep 0.05; done ;; esac
echo "42 cases, 0 failed"
case "$*" in {failing}) exit 1 ;; esac
"""
FAKE_SANITIZER = """#!/bin/bash
tool=$2
while [ "${1#-}" != "$1" ]; do shift 2; done
"$@"
[ "$SANITIZER" != "silent $tool" ] || exit 0
case $tool in
  racecheck)
    [ "$SANITIZER" != race ] || echo "========= Error: Race reported between Read access at void xlstm::cuda::mlstm_gates+0x1"
    echo "========= RACECHECK SUMMARY: 7 hazards displayed (7 errors, 0 warnings)" ;;
  *) if [ "$SANITIZER" = "error $tool" ]; then echo "========= ERROR SUMMARY: 1 error"
     else echo "========= ERROR SUMMARY: 0 errors"; fi ;;
esac
[ "$SANITIZER" != aborted ] || exit 134
"""


FAKE_CMAKE = """#!/bin/bash
echo "$*" >>{calls}
if [ "$1" = --install ]; then mkdir -p "$4/libxlstm"; exit; fi
mkdir -p "$4/bin"; touch "$4/bin/cuda_conformance" "$4/bin/host_conformance"
"""


def prepare_gpu_check(folder, failing="nothing", generic="", hanging="nothing", sanitizer=True, **environment):
    """Stand-ins for everything that scripts/gpu_check.sh starts -> its environment."""
    tools, built, out = folder / "tools", folder / "built", folder / "out"
    for path in (tools, built / "bin", out):
        path.mkdir(parents=True)
    calls = folder / "calls.txt"
    fake = FAKE_PYTHON.format(real=sys.executable, calls=calls, failing=failing, generic=generic, hanging=hanging)
    programs = {tools / "python": fake, tools / "cmake": FAKE_CMAKE.format(calls=calls),
                built / "bin/cuda_conformance": "#!/bin/bash\n:>$1\n", built / "bin/host_conformance": "#!/bin/bash\n:>$1\n"}
    programs |= {tools / name: "#!/bin/bash\n" for name in ("nvcc", "ninja")}
    if sanitizer:
        programs[tools / "compute-sanitizer"] = FAKE_SANITIZER
    for path, text in programs.items():
        path.write_text(text)
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "OUT": str(out),
            "SANITIZER": "", **environment}


def run_gpu_check(folder, **options):
    """scripts/gpu_check.sh with stand-ins for everything it starts -> (process, its summary, calls of python)."""
    done = subprocess.run([ROOT / "scripts" / "gpu_check.sh", "--built", folder / "built"], capture_output=True, text=True,
                          env=prepare_gpu_check(folder, **options))
    calls = (folder / "calls.txt").read_text().splitlines()
    return done, json.loads((folder / "out/summary.json").read_text()), [line.split("|") for line in calls]


def test_gpu_check_runs_every_part_and_counts(tmp_path):
    done, summary, calls = run_gpu_check(tmp_path / "well")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary["count"] == {"PASS": 21, "FAIL": 0, "SKIP": 0} and summary["device"] == "A GPU" and summary["finished"]
    assert not list((tmp_path / "well/out").glob("running-*"))
    assert {check["part"] for check in summary["checks"]} == {"build", "conformance", "ops", "sanitizer", "portable", "bench", "slstm"}
    small = [call for call in calls if call[0] == "scripts/gpu_ops.py --small"]
    # Three tools with both kernels, one of the tools on a library of its own; every tensor an allocation.
    assert len(small) == 6 and [call[1] for call in small].count("0") == 3 and all(call[3] == "1" for call in small)
    assert sum(call[2].endswith("/racecheck") for call in small) == 2
    assert {tuple(call[:2]) for call in calls if "--expect" in call[0]} == {
        ("scripts/gpu_ops.py --expect _sm90", ""), ("scripts/gpu_ops.py --expect mlstm_sweep", "0")}
    assert all("gpu_mlstm.py" in call[0] or "gpu_slstm.py" in call[0] for call in calls[-2:]), "benchmarks last and alone"


@pytest.mark.parametrize("options, wrong", [
    (dict(failing="*test_slstm_cuda*"), [("ops", "test_slstm"), ("portable", "test_slstm")]),
    (dict(generic="--expect slstm"), [("ops", "float64"), ("portable", "float64")]),
    (dict(generic="--expect gated_linear_attention"), [("ops", "float64"), ("portable", "float64")]),
    (dict(SANITIZER="race"), [("sanitizer", "racecheck"), ("portable", "racecheck")]),
    (dict(SANITIZER="error memcheck"), [("sanitizer", "memcheck"), ("portable", "memcheck")]),
    (dict(SANITIZER="silent synccheck"), [("sanitizer", "synccheck"), ("portable", "synccheck")]),
    (dict(SANITIZER="silent racecheck"), [("sanitizer", "racecheck"), ("portable", "racecheck")]),
])
def test_gpu_check_sees_what_fails(tmp_path, options, wrong):
    done, summary, _ = run_gpu_check(tmp_path, **options)
    assert done.returncode == 1
    failed = [(check["part"], check["check"]) for check in summary["checks"] if check["result"] == "FAIL"]
    assert len(failed) == len(wrong), failed
    for part, text in wrong:
        assert any(part == p and text in c for p, c in failed), failed


def test_gpu_check_judges_sanitizers_by_what_they_say(tmp_path):
    """Not by the status that a process has whose threads were cut off when Python ended."""
    done, summary, _ = run_gpu_check(tmp_path, SANITIZER="aborted")
    assert done.returncode == 0 and summary["count"]["FAIL"] == 0, done.stdout


def test_gpu_check_that_is_killed_leaves_what_it_has(tmp_path):
    """Results of the checks that ended, and what the others have printed."""
    environment = prepare_gpu_check(tmp_path, hanging="*gpu_ops.py*--expect*")
    out = tmp_path / "out"
    process = subprocess.Popen([ROOT / "scripts" / "gpu_check.sh", "--built", tmp_path / "built", "--only", "conformance,ops"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
    try:
        for _ in range(1200):  # all but that one have ended
            if (out / "summary.json").exists() and len(json.loads((out / "summary.json").read_text())["checks"]) == 9:
                break
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (tmp_path / "calls.txt.go_on").touch()
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["finished"] and summary["count"] == {"PASS": 9, "FAIL": 0, "SKIP": 0}
    assert {check["part"] for check in summary["checks"]} == {"build", "conformance", "ops"}
    (printed,) = out.glob("running-ops-*.txt")
    assert "gated_linear_attention: kernels for CUDA" in printed.read_text()


def tree_of_its_own(folder):
    """What builds does so beside itself."""
    (folder / "tree/scripts").mkdir(parents=True)
    for name in ("gpu_check.sh", "gpu_build.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "tree/scripts" / name)
    for module in modules_of(ROOT):
        (folder / "tree" / module).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / module, folder / "tree" / module)


def modules_of(folder):
    """All of the Python package: each imports others."""
    return {str(path.relative_to(folder)) for path in (folder / "libxlstm").rglob("*.py")}


@pytest.mark.parametrize("sanitizer", [True, False])
def test_gpu_check_builds_and_runs_nothing_for_a_missing_sanitizer(tmp_path, sanitizer):
    if not sanitizer and shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is installed here")
    environment = prepare_gpu_check(tmp_path, sanitizer=sanitizer)
    tree_of_its_own(tmp_path)
    done = subprocess.run([tmp_path / "tree/scripts/gpu_check.sh", "--only", "sanitizer"], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {(check["part"], check["check"]): check["result"]
              for check in json.loads((tmp_path / "out/summary.json").read_text())["checks"]}
    assert ("XLSTM_RACECHECK" in (tmp_path / "calls.txt").read_text()) == sanitizer
    assert (("build", "operators for racecheck") in checks) == sanitizer
    expected = [("memcheck", "PASS"), ("racecheck", "PASS"), ("synccheck", "PASS")]
    missing = [("compute-sanitizer is missing here", "SKIP")]
    assert sorted((c, r) for (p, c), r in checks.items() if p == "sanitizer") == (expected if sanitizer else missing)


def copy_of_the_builder(folder):
    """scripts/gpu_build.sh in a tree of its own, with stand-ins for what it starts -> how to run it."""
    environment = prepare_gpu_check(folder)
    tree_of_its_own(folder)

    def run(*arguments):
        return subprocess.run([folder / "tree/scripts/gpu_build.sh", *arguments], capture_output=True, text=True, cwd=folder,
                              env=environment)

    return run


def test_gpu_build_makes_a_folder_that_gpu_check_takes(tmp_path):
    build = copy_of_the_builder(tmp_path)
    assert build("made", "90").returncode == 0
    assert {path.name for path in (tmp_path / "made/bin").iterdir()} == {"cuda_conformance", "host_conformance"}
    assert modules_of(tmp_path / "made/python") == modules_of(tmp_path / "made/racecheck") == modules_of(ROOT)
    configured = [line for line in (tmp_path / "calls.txt").read_text().splitlines() if line.startswith("-S")]
    assert len(configured) == 2 and all("80-real;90a-real" in line and "VARIANTS=all" in line for line in configured)
    assert "CONFORMANCE=ON" in configured[0] and "RACECHECK=ON" in configured[1]
    assert build("other", "120", "racecheck").returncode == 0
    assert not (tmp_path / "other/python").exists() and "120-real" in (tmp_path / "calls.txt").read_text()


@pytest.mark.parametrize("arguments, said", [
    ([], "a folder and a compute capability"), (["made"], "a folder and a compute capability"),
    (["made", "9.0"], "without a point"), (["made", "75"], "8.0 or later"), (["made", "90", "tests"], "unknown argument tests"),
])
def test_gpu_build_says_what_it_takes(tmp_path, arguments, said):
    done = copy_of_the_builder(tmp_path)(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert not (tmp_path / "calls.txt").exists()


def test_tiny_models(tmp_path, monkeypatch):
    """gpu_model.py runs the trainer's own step; the peer's part runs in the mLSTM benchmark's way and is left out here."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_model

    assert gpu_model.main(["--tiny", "--sizes", "125m", "--steps", "3", "--decode", "4", "--no-peers", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "gpu_model.json").read_text())["cases"]
    assert [case["case"].split(" ")[0] for case in cases] == ["xLSTM[1:0]", "xLSTM[7:1]"]
    for case in cases:
        ours = case["libxlstm"]
        assert ours["batch"] == 2 and ours["seq_len"] == 64
        assert ours["training"]["tokens_per_s"] == pytest.approx(128e3 / ours["training"]["step_ms"])
        training = ours["training"]
        assert training["mfu"] == pytest.approx(
            training["tokens_per_s"] * training["model_flops_per_token"] / (1e12 * training["matmul_tflops"]))
        assert ours["decoding"]["token_ms"] > 0
