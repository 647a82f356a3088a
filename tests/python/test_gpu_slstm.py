"""scripts/bench/gpu_slstm.py and the sLSTM's part of scripts/gpu_ops.py, as far as they run without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libxlstm  # noqa: F401  registers torch.ops.xlstm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    import gpu_slstm

    yield gpu_slstm
    sys.path.remove(str(ROOT / "scripts" / "bench"))


@pytest.fixture(scope="module")
def ops():
    sys.path.insert(0, str(ROOT / "scripts"))
    import gpu_ops_slstm

    yield gpu_ops_slstm
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def tiny(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    status = bench.main(["--device", "cpu", "--tiny", "--out", str(folder)])
    torch.set_num_threads(threads)
    return status, json.loads((folder / "gpu_slstm.json").read_text()), folder


def test_tiny_run(tiny):
    status, report, folder = tiny
    assert status == 0 and report["bad"] == [] and report["skipped"] == []
    assert {"date", "device", "torch"} <= set(report["machine"])
    assert (folder / "gpu_slstm.png").stat().st_size > 1000
    ours = [c for c in report["checks"] if c["operator"].startswith("libxlstm")]
    assert len(ours) == 3 + 4 and all(c["within_limits"] for c in ours)
    assert all({"y", "dr", "db"} <= set(c["errors"]) for c in ours)


def test_the_peers_compute_the_same(tiny):
    """Same gate order, same side of the recurrent matrices: otherwise the comparison is of two things."""
    peers = [c for c in tiny[1]["checks"] if not c["operator"].startswith("libxlstm")]
    assert {"torch LSTM", "flashrnn vanilla", "flashrnn vanilla, lstm"} == {c["operator"] for c in peers}
    assert all(c["within_limits"] for c in peers), peers


def test_every_time_is_one_that_was_measured(tiny):
    for row in tiny[1]["cases"]:
        dense = row["case"]["heads"] == 1
        assert ("torch LSTM" in row["times"]) == dense and "libxlstm" in row["times"]
        for result in row["times"].values():
            for name in ("forward", "backward", "both"):
                low, high = result[name]["quartiles_ms"]
                assert 0 < low <= result[name]["median_ms"] <= high
                assert result[name]["step_us"] == pytest.approx(1e3 * result[name]["median_ms"] / row["case"]["time"])
        ratio = row["ratios"]["flashrnn vanilla"]
        assert ratio["ours"] == "libxlstm"
        assert ratio["both"] == pytest.approx(
            row["times"]["flashrnn vanilla"]["both"]["median_ms"] / row["times"]["libxlstm"]["both"]["median_ms"])
        if dense:
            assert row["ratios"]["torch LSTM"]["ours"] == "libxlstm, lstm layer"
    assert len(tiny[1]["steps"]["cases"]) == 2


def test_nothing_is_timed_where_ours_is_wrong(bench, tmp_path, monkeypatch):
    right = bench.ours

    def wrong():
        operators = right()
        function = operators[0].function
        operators[0].function = lambda wx, r, b: function(wx, r, b + 0.01)
        return operators

    monkeypatch.setattr(bench, "ours", wrong)
    assert bench.main(["--device", "cpu", "--tiny", "--no-peers", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu_slstm.json").read_text())
    assert report["cases"] == [] and "steps" not in report
    assert report["bad"] and all(line.startswith("libxlstm NH=") for line in report["bad"])


def test_failure_of_ours_is_reported(bench, tmp_path, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(bench, "passes", failing)
    assert bench.main(["--device", "cpu", "--tiny", "--no-peers", "--suites", "heads", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu_slstm.json").read_text())
    assert "planted" in report["bad"][0]


def test_work_counts(bench):
    assert bench.work(bench.Case("heads", 2, 3, 4, 8)) == {"forward": 12288, "backward": 24576, "both": 36864}


def test_comparison_with_float64_holds_on_the_cpu(ops):
    """Also that a difference is seen, in every result."""
    for case in (ops.Case(9, 16, torch.float32, states=True, decode=True), ops.Case(9, 16, torch.bfloat16, reset=True),
                 ops.Case(9, 16, torch.float32, batch=1, packed=(4, 0, 5), cell="lstm", states=True, recompute=True)):
        errors = ops.compare(case, "cpu", seed=1)
        assert all(error <= ops.LIMITS[case.dtype][0] for error in errors.values()), (case.title(), errors)
        assert {"y", "y_last", "c", "dwx", "dr", "db"} <= set(errors) and ("dy0" in errors) == case.states
    case = ops.Case(9, 24, torch.float32, states=True)
    errors = ops.compare_decoding(case, "cpu", seed=1)
    assert set(errors) == {"y", "y_last", "c"} and all(error < 1e-5 for error in errors.values())


def test_comparison_sees_a_difference(ops, monkeypatch):
    right = ops.run

    def wrong(case, tensors, states, weights, device, dtype=None):
        results = right(case, tensors, states, weights, device, dtype)
        return results if dtype else {name: 1.001 * x for name, x in results.items()}

    monkeypatch.setattr(ops, "run", wrong)
    errors = ops.compare(ops.Case(9, 16, torch.float32, states=True), "cpu", seed=1)
    assert all(error > ops.LIMITS[torch.float32][0] for error in errors.values())


def test_cases_cover_what_the_operator_takes(ops):
    for small in (False, True):
        cases = list(ops.cases(small))
        assert all(sum(case.packed) == case.time and case.batch == 1 for case in cases if case.packed)
        assert {case.dh > 1024 for case in cases} == {False, True}
    cases = list(ops.cases())
    assert {case.cell for case in cases} == set(ops.CELLS) and {case.dtype for case in cases} == set(ops.LIMITS)
    for field in ("states", "reset", "packed", "recompute", "clip", "cut", "float_parameters", "decode"):
        assert any(getattr(case, field) for case in cases), field


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_script_says_so():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "bench" / "gpu_slstm.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stderr
