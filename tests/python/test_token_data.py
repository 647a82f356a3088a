"""libxlstm.TokenData: prepared token files in Python, in the order in which the trainer visits them."""

import copy
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import XLSTM_DATA, read_megatron, run, write_jsonl
from test_pickle import pickled

import libxlstm

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "permute_golden.inc"

# The order of samples, written here a second time: csrc/data/sampling.cpp must agree with it for ever, since resumed
# runs rely on it.
MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permute(index, n, seed, epoch, order):
    if n == 1:
        return 0
    half = ((n - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    key = mix64((mix64((seed + GAMMA) & MASK) + epoch) & MASK)
    rounds, flip = (4, 0) if order == 1 else (12, mix64(key) & 1)
    value = index
    while True:
        left, right = value >> half, value & low
        for turn in range(1, rounds + 1):
            left, right = right, left ^ (mix64((key + turn * GAMMA + right) & MASK) & low)
        value = left << half | right
        if value < 2:
            value ^= flip
        if value < n:
            return value


def mixture(weights, samples):
    """Which file each sample is of, and how many it gave before: each time the one that lags most."""
    total, period = sum(weights), 65536
    shares = [round(weight / total * period) for weight in weights]
    assert sum(shares) == period
    given, order = [0] * len(shares), []
    for sample in range(samples):
        lags = [(sample + 1) * share - period * before for share, before in zip(shares, given)]
        source = lags.index(max(lags))
        order.append((source, given[source]))
        given[source] += 1
    return order


def samples_in_order(documents_of_files, weights, seq_len, seed, shuffle, count):
    """(ids, targets, reset) of each sample, by the numbers above."""
    for source, rank in mixture(weights, count):
        documents = documents_of_files[source]
        tokens = np.concatenate(documents).astype(np.int64)
        starts = np.zeros(len(tokens), bool)
        starts[np.cumsum([0] + [len(d) for d in documents[:-1]])] = True
        windows, slack = divmod(len(tokens) - 1, seq_len)
        epoch, index = divmod(rank, windows)
        key, before = (mix64(seed) + source) & MASK, 0
        if shuffle:
            index = permute(index, windows, key, epoch, 2)
            before = mix64(mix64(key) ^ epoch) % (slack + 1)
        first = before + index * seq_len
        ids, targets = tokens[first:first + seq_len], tokens[first + 1:first + seq_len + 1].copy()
        targets[starts[first + 1:first + seq_len + 1]] = -100
        reset = starts[first:first + seq_len].copy()
        reset[0] = True
        yield ids, targets, reset


def test_golden_permutations():
    rows = re.findall(r"\{(\d+)u, (\d+)u, (\d+)u, (\d+)u, (\d+), (\d+)u\}", GOLDEN.read_text())
    assert len(rows) > 200
    for index, n, seed, epoch, order, value in (map(int, row) for row in rows):
        assert permute(index, n, seed, epoch, order) == value
    assert sorted(permute(i, 1000, 7, 3, 2) for i in range(1000)) == list(range(1000))


@pytest.fixture
def two_files(tmp_path):
    for name, count in (("a", 300), ("b", 90)):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" * (1 + i % 7) for i in range(count)])
        run("prepare", tmp_path / f"{name}.jsonl", "--output", tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("shuffle", (True, False))
@pytest.mark.parametrize("weights", ((1,), (3, 1)))
def test_token_data_has_the_order_of_samples(two_files, weights, shuffle):
    files = [read_megatron(prefix)[1] for prefix in two_files[:len(weights)]]
    data = libxlstm.TokenData(two_files[:len(weights)], 16, seed=77, shuffle=shuffle, weights=weights)
    assert len(data) == sum((sum(map(len, documents)) - 1) // 16 for documents in files)
    assert data.num_tokens == sum(len(d) for documents in files for d in documents) and data.vocab_size == 256
    count = 2 * len(data)  # the smaller file comes round several times
    ids, targets, reset = data.batch(0, count)
    assert (ids.dtype, targets.dtype, reset.dtype) == (torch.int64, torch.int64, torch.bool)
    assert ids.shape == targets.shape == reset.shape == (count, 16)
    for i, wanted in enumerate(samples_in_order(files, weights, 16, 77, shuffle, count)):
        for got, want in zip((ids[i], targets[i], reset[i]), wanted):
            assert got.tolist() == want.tolist(), i
    for step, batch in enumerate(data.batches(8, first=3, steps=4)):
        for got, want in zip(batch, (ids, targets, reset)):
            assert torch.equal(got, want[3 + 8 * step:11 + 8 * step])
    assert step == 3
    assert len(list(zip(range(9), data.batches(len(data))))) == 9  # goes on beyond an epoch


def test_token_data_is_what_the_trainer_reads(two_files, tmp_path):
    model = libxlstm.make_model("model: {embedding_dim: 32, num_blocks: 2, num_heads: 2, dropout: 0}")
    model.save(tmp_path / "first")
    sources = ", ".join(f"{{path: {prefix}, weight: {weight}}}" for prefix, weight in zip(two_files, (1, 2)))
    (tmp_path / "c.yaml").write_text(
        f"run: {{name: r, out_dir: {tmp_path}, device: cpu}}\nmodel: {{embedding_dim: 32, num_blocks: 2, num_heads: 2}}\n"
        f"data: {{train: [{sources}], seq_len: 24, shuffle_seed: 5}}\n"
        "train: {global_batch_size: 4, micro_batch_size: 2, max_steps: 6}\n"
        "optim: {learning_rate: 1.0e-30, min_lr: 0, warmup_steps: 1}\nlog: {every: 1, tensorboard: false, plot: false}\n")
    for carry in (False, True):
        name = f"run.name=carry{carry}"
        settings = [name, f"train.init_from={tmp_path}/first", f"train.carry_state={str(carry).lower()}"]
        command = [XLSTM_DATA.parent / "xlstm-train", tmp_path / "c.yaml", *settings]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / f"carry{carry}" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        data = libxlstm.TokenData(two_files, 24, seed=5, weights=[1, 2], streams=4 if carry else 0)
        state, own = None, []
        for ids, targets, reset in data.batches(4, steps=6):
            loss, state = model(ids, state if carry else None, reset, targets=targets)
            own.append(loss.item())
        assert losses == pytest.approx(own, abs=1e-5) and len(set(losses)) == 6


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_token_data_is_a_map_style_dataset(two_files):
    data = libxlstm.TokenData(two_files, 16, seed=3, weights=[2, 1])
    wanted = data.batch(0, len(data))
    for i in (0, 5, len(data) - 1, -1, -len(data)):
        assert same(data[i], [x[i] for x in wanted])
    for i in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match=f"sample: expected one from {-len(data)} to {len(data) - 1}, got {i}"):
            data[i]
    assert len(list(data)) == len(data)
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="spawn")
    for step, batch in zip(range(3), loader):
        assert same(batch, data.batch(8 * step, 8))


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_token_data(two_files, copying):
    data = libxlstm.TokenData(two_files, 16, 9, False, [1, 3], 4, False, False)
    data.note = "mine"
    other = copying(data)
    assert repr(other) == repr(data) and other.note == "mine" and same(other.batch(3, 7), data.batch(3, 7))


def test_token_data_names_what_is_wrong(two_files):
    for wrong in ({"seq_len": 16.5}, {"seq_len": None}, {"seed": -1}, {"seed": 2**64}, {"streams": "4"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected an integer"):
            libxlstm.TokenData(two_files, **{"seq_len": 16} | wrong)
    for place, name in enumerate(("first_sample", "count")):
        with pytest.raises(ValueError, match=f"{name}: expected an integer, got 0.5"):
            libxlstm.TokenData(two_files, 16).batch(*([0.5, 1] if place == 0 else [1, 0.5]))
    with pytest.raises(libxlstm.Error, match="nope.idx: no such file"):
        libxlstm.TokenData("nope", 16)
    with pytest.raises(libxlstm.Error, match="a.bin: .* tokens, but a window"):
        libxlstm.TokenData(two_files[0], 100_000)
    with pytest.raises(libxlstm.Error, match="not positive"):
        libxlstm.TokenData(two_files, 16, weights=[1, 0])
    with pytest.raises(ValueError, match="one for each of the 2 token files, got 1"):
        libxlstm.TokenData(two_files, 16, weights=[1])
    with pytest.raises(libxlstm.Error, match="negative sample index"):
        libxlstm.TokenData(two_files, 16).batch(-1, 2)
    two_files[1].with_suffix(".meta.json").unlink()
    assert libxlstm.TokenData(two_files, 16).vocab_size is None
