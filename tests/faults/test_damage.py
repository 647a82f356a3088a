"""Damaged checkpoints and token files are found, named, and never used."""

import shutil

import pytest
from conftest import FULL
from tiny_run import TinyRun, program

FLIPS = 100 if FULL else 20
FALLBACKS = 5 if FULL else 1
FILES = ["model.safetensors", "optim-rank00000.safetensors", "trainer.json", "config.yaml", "MANIFEST.json"]


def flip_bit(path, rng):
    data = bytearray(path.read_bytes())
    bit = rng.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))
    return bit


def load(checkpoint):
    return program("xlstm-generate", checkpoint, "--prompt", "x", "--max-new-tokens", 0)


def assert_named(done, path):
    assert done.returncode == 4, f"exit {done.returncode}: {done.stderr}"
    assert str(path) in done.stderr, f"{path} is not named in: {done.stderr}"
    assert done.stderr.count("\n") == 1, f"more than one line: {done.stderr}"


@pytest.fixture
def checkpoint(reference, tmp_path):
    copy = tmp_path / "step-00000100"
    shutil.copytree(reference.run.checkpoints()[-1], copy)
    assert sorted(p.name for p in copy.iterdir()) == sorted(FILES)
    assert load(copy).returncode == 0
    return copy


def test_every_flipped_bit_is_found_and_named(checkpoint, rng):
    found = 0
    for _ in range(FLIPS):
        path = checkpoint / rng.choice(FILES)
        good = path.read_bytes()
        bit = flip_bit(path, rng)
        done = load(checkpoint)
        if done.returncode == 4 and str(path) in done.stderr and done.stderr.count("\n") == 1:
            found += 1
        else:
            print(f"missed: bit {bit} of {path}: exit {done.returncode}, {done.stderr}")
        path.write_bytes(good)
    print(f"{found} of {FLIPS} flipped bits found and named")
    assert found == FLIPS


@pytest.mark.parametrize("name", FILES)
def test_truncated_zeroed_and_missing_files_are_named(name, checkpoint, rng):
    path = checkpoint / name
    good = path.read_bytes()
    path.write_bytes(good[:rng.randrange(len(good))])
    assert_named(load(checkpoint), path)
    start = rng.randrange(len(good) - 1)
    path.write_bytes(good[:start] + bytes(len(good) - start))
    assert_named(load(checkpoint), path)
    path.unlink()
    assert_named(load(checkpoint), checkpoint if name == "MANIFEST.json" else path)


def test_swapped_files_are_found(checkpoint):
    first, second = checkpoint / FILES[0], checkpoint / FILES[1]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert_named(load(checkpoint), first)


@pytest.mark.parametrize("case", range(FALLBACKS))
def test_training_falls_back_to_the_checkpoint_before(case, tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    killed = run.train(XLSTM_FAILPOINT="ckpt.prune:20")  # dies with 30, 40 and 50 committed
    assert killed.returncode == -9
    bad = run.checkpoints()[-1] / rng.choice(FILES)
    flip_bit(bad, rng)
    done = run.train(check=0)
    assert str(bad) in done.stdout + done.stderr, "the damaged file is named"
    assert run.fingerprint() == reference.fingerprint


def test_a_named_checkpoint_never_falls_back(tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    shutil.copytree(reference.run.path, run.path)
    bad = run.checkpoints()[-2] / "model.safetensors"
    flip_bit(bad, rng)
    step = int(bad.parent.name.split("-")[1])
    done = run.train(f"run.resume=step-{step}")
    assert done.returncode == 4 and str(bad) in done.stderr, done.stderr


def test_all_checkpoints_bad_is_an_error_and_nothing_is_lost(tmp_path, shared, reference, rng):
    run = TinyRun(tmp_path, shared)
    shutil.copytree(reference.run.path, run.path)
    for folder in run.checkpoints():
        flip_bit(folder / "model.safetensors", rng)
    before = [p.name for p in run.checkpoints()]
    assert run.train().returncode == 4
    assert [p.name for p in run.checkpoints()] == before


def test_flipped_bits_in_token_files_are_found(tmp_path, shared, rng):
    prefix = tmp_path / "tokens"
    program("xlstm-data", "prepare", "--output", prefix, shared / "text.txt", check=0)
    run = TinyRun(tmp_path, shared)
    arguments = ["data.text=", f"data.train=[{{path: {prefix}}}]", f"data.val={prefix}", "data.verify=sha256",
                 "train.max_steps=1"]
    run.train(*arguments, check=0)
    for suffix in [".bin", ".idx"] * (5 if FULL else 1):
        path = prefix.with_suffix(suffix)
        good = path.read_bytes()
        flip_bit(path, rng)
        done = run.train(*arguments, "--fresh")
        assert done.returncode == 3 and str(prefix) in done.stderr, done.stderr
        path.write_bytes(good)
