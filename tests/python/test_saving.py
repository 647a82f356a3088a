"""model.save(folder): the model that was there before stays until the new one is whole."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libxlstm

ROOT = Path(__file__).resolve().parents[2]
SAVE = "import libxlstm, sys; libxlstm.load(sys.argv[1]).save(sys.argv[2])"
SMALL = {"model": {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2}}


def make_model(seed):
    torch.manual_seed(seed)
    return libxlstm.make_model(SMALL)


def holds(folder, model):
    return all(torch.equal(a, b) for a, b in zip(libxlstm.load(folder).parameters(), model.parameters(), strict=True))


def python(code, *arguments, **environment):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_over_an_earlier_model(tmp_path):
    first, second = make_model(1), make_model(2)
    first.save(tmp_path / "model")
    (tmp_path / "model" / "notes").write_text("of the first")
    second.save(f"{tmp_path}/model//")
    assert holds(tmp_path / "model", second)
    (tmp_path / "empty").mkdir()
    first.save(tmp_path / "empty")
    assert holds(tmp_path / "empty", first)
    assert sorted(os.listdir(tmp_path)) == ["empty", "model"] and not (tmp_path / "model" / "notes").exists()


def test_a_failed_save_leaves_the_old_model(tmp_path):
    first = make_model(1)
    first.save(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="model.safetensors.*File too large"):
            make_model(2).save(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["model"] and holds(tmp_path / "model", first)


@pytest.mark.parametrize("moment", ["ckpt.after_mkdir:0", "ckpt.write:20000,ckpt.write_step:0", "ckpt.before_rename:0",
                                    "ckpt.after_rename:0"])
def test_a_killed_save_leaves_the_old_model(moment, tmp_path):
    first = make_model(1)
    first.save(tmp_path / "model")
    done = python(SAVE, tmp_path / "model", tmp_path / "model", XLSTM_FAILPOINT=moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert holds(tmp_path / "model", first)
    second = make_model(2)
    second.save(tmp_path / "model")
    assert holds(tmp_path / "model", second)


@pytest.fixture
def two(tmp_path):
    """Two models in folders of their own, "first" and "second"."""
    models = make_model(1), make_model(2)
    for model, name in zip(models, ("first", "second"), strict=True):
        model.save(tmp_path / name)
    return models


def test_a_save_killed_while_it_replaces_leaves_the_new_model(two, tmp_path):
    done = python(SAVE, tmp_path / "second", tmp_path / "first", XLSTM_FAILPOINT="ckpt.replacing")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert holds(tmp_path / "first", two[1])


def test_where_names_cannot_be_exchanged_both_models_are_kept(two, tmp_path):
    done = python(SAVE, tmp_path / "second", tmp_path / "first", XLSTM_FAILPOINT="ckpt.no_exchange,ckpt.replacing")
    assert done.returncode == -signal.SIGKILL, done.stderr
    old, new, _ = sorted(tmp_path.iterdir())
    assert holds(old, two[0]) and holds(new, two[1])
    done = python(SAVE, new, tmp_path / "second", XLSTM_FAILPOINT="ckpt.no_exchange")
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == [old, new, tmp_path / "second"] and holds(tmp_path / "second", two[1])


def test_what_is_no_model_is_left_alone(tmp_path):
    first = make_model(1)
    first.save(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    for name in ("link", "link/", "link/.", "file", "folder", "folder/"):
        with pytest.raises(libxlstm.Error, match="choose another name"):
            make_model(2).save(f"{tmp_path}/{name}")
    assert holds(tmp_path / "model", first) and (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "" and os.listdir(tmp_path / "folder") == ["notes"]


def test_threads_that_save_at_once_count_their_own_bytes(tmp_path):
    """A fault that would come behind the end of each of the saves comes in none of them."""
    make_model(1).save(tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    code = """
import sys, threading, libxlstm
models = [libxlstm.make_model({"model": {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2}}) for _ in range(2)]
def save(i):
    for _ in range(40):
        models[i].save(f"{sys.argv[1]}/{i}")
threads = [threading.Thread(target=save, args=(i,)) for i in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("saved")
"""
    done = python(code, tmp_path, XLSTM_FAILPOINT=f"ckpt.write:{size * 5 // 4},ckpt.write_step:0")
    assert done.returncode == 0 and done.stdout == "saved\n", done.stderr
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "model"]
