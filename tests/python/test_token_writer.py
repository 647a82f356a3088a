"""libxlstm.TokenWriter: token files of ids that are there already, as xlstm-data prepare writes them of their text."""

import array
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_data import XLSTM_DATA, contents, read_megatron, run, write_jsonl

import libxlstm
from libxlstm import data as data_module
from libxlstm.scoring import Tokenizer

TEXTS = ["Grüße €😀", " a  b\n\n c", "plain text, and more of it\n" * 30, "x"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE with an end-of-document token, as its file."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    trained.train_from_iterator(["".join(TEXTS)], vocab_size=300, special_tokens=["<|endoftext|>"])
    trained.save(str(path))
    return path


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """Its documents as ids without their end, and what prepare wrote of their text."""
    run("prepare", write_jsonl(tmp_path / "t.jsonl", TEXTS), "--output", tmp_path / "want" / "out", "--tokenizer", tokenizer)
    of_text = Tokenizer(tokenizer)
    assert of_text.eos_id == 0
    return [of_text.encode(text) for text in TEXTS], contents(tmp_path / "want")


def assert_same(folder, wanted):
    """But for what tells where the documents are from."""
    made = contents(folder)
    assert made.keys() == wanted.keys()
    got, want = (json.loads(files["out.meta.json"]) for files in (made, wanted))
    for name in ("source_documents", "command", "inputs_sha256"):
        got.pop(name, None), want.pop(name)
    assert got == want
    for name in ("out.bin", "out.idx"):
        assert made[name] == wanted[name]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, np.uint16),
                                  lambda ids: torch.tensor(ids, dtype=torch.int32), lambda ids: array.array("i", ids)])
def test_documents_are_written_as_prepare_writes_their_text(prepared, tokenizer, tmp_path, kind):
    documents, wanted = prepared
    with libxlstm.TokenWriter(tmp_path / "got" / "out", tokenizer) as writer:
        for i, ids in enumerate(documents):
            writer.add(kind(ids + [0] if i % 2 else ids))  # with its end and without
        writer.add([])
        writer.add([0])
        assert writer.num_documents == len(documents)
        assert writer.num_tokens == sum(map(len, documents)) + len(documents)
    assert_same(tmp_path / "got", wanted)
    command = json.loads((tmp_path / "got" / "out.meta.json").read_text())["command"]
    assert command == f"libxlstm.TokenWriter({str(tmp_path / 'got' / 'out')!r}, {str(tokenizer)!r})"


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("begins", [False, True])
def test_streams_are_parted_at_their_ends(prepared, tokenizer, tmp_path, monkeypatch, piece, begins):
    """nanoGPT's have the end behind each document, llm.c's before each, and its files part documents anywhere."""
    documents, wanted = prepared
    stream = [token for ids in documents for token in ([0, *ids] if begins else [*ids, 0])]
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(stream)
    (tmp_path / "train.bin").write_bytes(header.tobytes() + np.array(stream, np.uint16).tobytes())
    tokens = np.memmap(tmp_path / "train.bin", "uint16", "r", offset=1024)
    monkeypatch.setattr(data_module, "_PIECE", piece)
    with libxlstm.TokenWriter(tmp_path / "got" / "out", tokenizer, count_bytes=piece > 7) as writer:
        writer.add_stream(tokens[:40])
        writer.add_stream(tokens[40:])
    if piece > 7:
        return assert_same(tmp_path / "got", wanted)
    _, found = read_megatron(tmp_path / "got" / "out")
    assert [ids.tolist() for ids in found] == [[*ids, 0] for ids in documents]
    assert json.loads((tmp_path / "got" / "out.meta.json").read_text())["num_bytes"] == 0
    assert "bytes: unknown" in run("stats", tmp_path / "got" / "out").stdout


def test_a_stream_ends_where_a_document_is_given(tmp_path):
    with libxlstm.TokenWriter(tmp_path / "out", "bytes", eos_id=10) as writer:
        writer.add_stream(list(b"one\ntw"))
        writer.add_stream(list(b"o"))
        writer.add(list(b"th\nree"))
    assert [bytes(ids.tolist()) for ids in read_megatron(tmp_path / "out")[1]] == [b"one\n", b"two\n", b"th\nree\n"]
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert (meta["num_bytes"], meta["eos_id"], meta["tokenizer"]) == (12, 10, "bytes")


def run_program(name, *args):
    done = subprocess.run([XLSTM_DATA.parent / name, *map(str, args)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "XLSTM_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_written_ids_are_trained_on_and_judged_as_text_is(prepared, tokenizer, tmp_path):
    documents, _ = prepared
    for name, counts in (("train", False), ("held", True)):
        with libxlstm.TokenWriter(tmp_path / name, tokenizer, count_bytes=counts) as writer:
            for ids in documents * 3:
                writer.add(ids)
    run("prepare", write_jsonl(tmp_path / "t.jsonl", TEXTS * 3), "--output", tmp_path / "text", "--tokenizer", tokenizer)
    (tmp_path / "c.yaml").write_text(
        f"run: {{name: r, out_dir: {tmp_path}, device: cpu}}\n"
        "model: {embedding_dim: 16, num_blocks: 1, num_heads: 1, vocab_size: 300}\n"
        f"data: {{train: [{{path: {tmp_path}/train}}], val: {tmp_path}/held, seq_len: 16}}\n"
        "train: {global_batch_size: 2, max_steps: 2}\noptim: {warmup_steps: 0}\nlog: {tensorboard: false, plot: false}\n")
    assert "held-out bits per byte: " in run_program("xlstm-train", tmp_path / "c.yaml")
    assert run_program("xlstm-generate", tmp_path / "r", "--prompt", "plain", "--max-new-tokens", 3).startswith("plain")
    held, text = (re.search(r"bits per byte (\d\.\d+)", run_program("xlstm-eval", tmp_path / "r", "--data", tmp_path / name))
                  for name in ("held", "text"))
    assert held.group(1) == text.group(1)
    unknown = run_program("xlstm-eval", tmp_path / "r", "--data", tmp_path / "train")
    assert "bits per byte unknown (no count of bytes)" in unknown


def test_nothing_is_left_of_what_fails(tmp_path):
    with pytest.raises(libxlstm.Error, match="token id 256 is beyond the tokenizer's vocabulary of 256; the ids are of"):
        with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
            writer.add([1, 2])
            writer.add([3, 256])
    with pytest.raises(libxlstm.Error, match="token id -1 is beyond"):
        with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
            writer.add([-1])
    with pytest.raises(ValueError, match="out: this TokenWriter has ended, by finish.. or by an error"):
        with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
            writer.add([1])
            with pytest.raises(libxlstm.Error):
                writer.add([300])
    with pytest.raises(KeyError):
        with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
            writer.add([1])
            raise KeyError
    with pytest.raises(ValueError, match="out: no ids were given"):
        with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
            writer.add_stream([0, 0])
    assert not list(tmp_path.iterdir())
    writer = libxlstm.TokenWriter(tmp_path / "out", "bytes")
    with pytest.raises(libxlstm.Error, match="another process is writing it"):
        libxlstm.TokenWriter(tmp_path / "out", "bytes")
    writer.add([1])
    writer.finish()
    with pytest.raises(ValueError, match="this TokenWriter has ended"):
        writer.add([1])


def test_token_writer_names_what_is_wrong(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="nope: no tokenizer there"):
        libxlstm.TokenWriter(tmp_path / "out", tmp_path / "nope")
    with pytest.raises(ValueError, match="eos_id: expected an integer from 0 to 255, got 256"):
        libxlstm.TokenWriter(tmp_path / "out", "bytes", eos_id=256)
    with pytest.raises(libxlstm.Error, match="names a folder, expected a prefix: .*/NAME"):
        libxlstm.TokenWriter(f"{tmp_path}/", "bytes")
    with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
        for wrong in ([1.5], np.ones(3), torch.ones(2, dtype=torch.bool), [[1, 2]], np.ones((2, 2), np.uint16), 1):
            with pytest.raises(ValueError, match="expected integers in one row"):
                writer.add(wrong)
        with pytest.raises(ValueError, match="expected integers in one row"):
            writer.add_stream(np.ones(3, np.float32))
        writer.add([1])
    made = contents(tmp_path)
    with pytest.raises(libxlstm.Error, match=r"out.bin is there already, made by another command \(1 documents, 2 tokens\): "):
        libxlstm.TokenWriter(tmp_path / "out", "bytes")
    assert contents(tmp_path) == made
    with libxlstm.TokenWriter(tmp_path / "out", "bytes", overwrite=True) as writer:
        writer.add([1, 2])
    assert [ids.tolist() for ids in read_megatron(tmp_path / "out")[1]] == [[1, 2, 0]]
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "words.json"))
    with libxlstm.TokenWriter(tmp_path / "words", tmp_path / "words.json") as writer:
        with pytest.raises(ValueError, match="has no end-of-document token, which parts documents; give its id as eos_id"):
            writer.add_stream([0, 1])
        writer.add([0, 1])
    assert [ids.tolist() for ids in read_megatron(tmp_path / "words")[1]] == [[0, 1]]
