"""The fault suite. XLSTM_FAULTS=full runs all of it (scripts/test.sh --faults), else a short version. XLSTM_FAULT_SEED
replays the moments and bits of an earlier run; the seed is printed with every failure."""

import os
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import TinyRun  # noqa: E402

FULL = os.environ.get("XLSTM_FAULTS") == "full"
SEED = int(os.environ.get("XLSTM_FAULT_SEED", random.SystemRandom().randrange(1 << 32)))


def pytest_report_header():
    return f"fault suite: {'full' if FULL else 'short (XLSTM_FAULTS=full for all)'}, XLSTM_FAULT_SEED={SEED}"


@pytest.fixture
def rng(request):
    print(f"XLSTM_FAULT_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


class Reference:
    """The run that nothing happened to."""

    def __init__(self, folder, shared):
        self.run = TinyRun(folder, shared)
        self.run.train("train.max_steps=1", "run.name=warm", check=0)  # fills the token cache and the page cache
        begin = time.time()
        process = self.run.start()
        self.run.wait_for_step(process, 1)
        self.seconds_to_step_1 = time.time() - begin
        assert process.wait(timeout=300) == 0, self.run.output()
        self.seconds = time.time() - begin
        self.fingerprint = self.run.fingerprint()
        assert [step for step, _ in self.fingerprint["losses"]] == list(range(1, self.run.steps + 1))


@pytest.fixture(scope="session")
def reference(tmp_path_factory, shared):
    return Reference(tmp_path_factory.mktemp("reference"), shared)
