"""Loading and copying a model draw no numbers of torch's stream."""

import copy
import threading

import pytest
import torch
from test_models import make_model

import libxlstm


@pytest.mark.parametrize("kind", ["xlstm", "rwkv4", "h3", "hyena"])
def test_loading_leaves_the_generator_alone(kind, tmp_path):
    settings = {"kind": kind, "embedding_dim": 16, "num_blocks": 1, "num_heads": 2}
    libxlstm.make_model({"model": settings}).save(tmp_path / "model")
    state = torch.get_rng_state()
    libxlstm.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_leaves_the_draws_of_other_threads_alone(tmp_path):
    """Copies, too: each number of the stream comes once, in its order."""
    make_model().save(tmp_path / "model")
    torch.manual_seed(4)
    expected = [torch.rand(()).item() for _ in range(30_000)]
    model, drawn = make_model(), []

    def load():
        for _ in range(20):
            libxlstm.load(tmp_path / "model")
            copy.deepcopy(model)

    torch.manual_seed(4)
    thread = threading.Thread(target=load)
    thread.start()
    while thread.is_alive() and len(drawn) < len(expected):
        drawn.append(torch.rand(()).item())
    thread.join()
    assert len(drawn) > 100 and drawn == expected[: len(drawn)]
