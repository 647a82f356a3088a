"""xlstm-train on a GPU: its steps recorded as a CUDA graph are the steps it makes without. Skipped without one."""

import pytest
import torch

from test_prompts import check_that_batches_in_which_nothing_counts_change_nothing
from test_prompts import setup as of_prompts  # noqa: F401
from test_train import PROGRAM, corpus, losses, setup, train  # noqa: F401

pytestmark = [pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CHECKPOINTS = "model.activation_checkpointing=true"
DROPOUT = "model.dropout=0.1"
# Reads on the host where documents start.
H3 = ("model.kind=h3", "model.slstm_at=[]", "data.reset_state_at_document=true")


@pytest.mark.parametrize("settings, outcome", [
    ((), "step is recorded"),
    ((CHECKPOINTS,), "step is recorded"),
    ((DROPOUT,), "step is recorded"),
    ((DROPOUT, CHECKPOINTS), None),  # not tried
    (H3, "step cannot be recorded"),
    ((*H3, DROPOUT), "step cannot be recorded"),  # draws after a recording that failed
])
def test_steps_are_the_same_with_and_without_a_recording(setup, settings, outcome):  # noqa: F811
    config, run = setup
    runs = []
    for graph in ("true", "false"):
        done = train(config, "--fresh", "run.device=cuda", f"train.cuda_graph={graph}", *settings)
        assert done.returncode == 0, done.stderr
        log = (run / "run.log").read_text()
        for said in ("step is recorded", "step cannot be recorded"):
            assert (said in log) == (said == outcome and graph == "true"), log
        runs.append({step: float.fromhex(loss) for step, loss in losses(run).items()})
    assert runs[0].keys() == runs[1].keys() and len(runs[0]) == 12
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


@pytest.mark.parametrize("graph", ["true", "false"])
def test_batches_in_which_nothing_counts_change_nothing(of_prompts, graph):  # noqa: F811
    check_that_batches_in_which_nothing_counts_change_nothing(*of_prompts, 1, "run.device=cuda", f"train.cuda_graph={graph}")
