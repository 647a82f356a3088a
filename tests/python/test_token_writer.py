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
from libxlstm import token_writer as writer_module
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
    for name in made.keys() - {"out.meta.json"}:
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
    monkeypatch.setattr(writer_module, "_PIECE", piece)
    with libxlstm.TokenWriter(tmp_path / "got" / "out", tokenizer, count_bytes=piece > 7) as writer:
        writer.add_stream(tokens[:40])
        writer.add_stream(tokens[40:])
    if piece > 7:
        return assert_same(tmp_path / "got", wanted)
    _, found = read_megatron(tmp_path / "got" / "out")
    assert [ids.tolist() for ids in found] == [[*ids, 0] for ids in documents]
    assert json.loads((tmp_path / "got" / "out.meta.json").read_text())["num_bytes"] == 0
    assert "bytes: unknown" in run("stats", tmp_path / "got" / "out").stdout


CHATS = [[("User: Grüße €😀\n", False), ("plain text\n", True), ("User: x\n", False), ("and more of it", True)],
         [("a text that counts", True)], [("x\n", True), (" a  b\n\n c", False)], [("nothing of it counts", False)]]


@pytest.fixture
def prepared_chats(tokenizer, tmp_path):
    """Ids and masks without the documents' ends, and what prepare wrote of the texts."""
    lines = [{"text": [{"text": text, "loss": loss} for text, loss in chat]} for chat in CHATS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("prepare", tmp_path / "chats.jsonl", "--output", tmp_path / "want" / "out", "--tokenizer", tokenizer)
    encode, rows = Tokenizer(tokenizer).encode, []
    for chat in CHATS:
        ids = [encode(text) for text, _ in chat]
        mask = [[int(loss)] * len(part) for part, (_, loss) in zip(ids, chat)]
        rows.append((sum(ids, []), sum(mask, [])))
    return rows, contents(tmp_path / "want")


def as_labels(ids, mask):
    return [token if counts else -100 for token, counts in zip(ids, mask)]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda row: np.array(row, np.int16)])
@pytest.mark.parametrize("name", ["mask", "bools", "labels"])
def test_masks_and_labels_are_written_as_prepare_writes_segments(prepared_chats, tokenizer, tmp_path, name, kind):
    rows, wanted = prepared_chats
    with libxlstm.TokenWriter(tmp_path / "got" / "out", tokenizer) as writer:
        for i, (ids, mask) in enumerate(rows):
            if i % 2:  # with its end, and what is said of that
                ids, mask = ids + [0], mask + mask[-1:]
            if all(mask):
                writer.add(kind(ids))
            elif name == "labels":
                writer.add(kind(ids), labels=kind(as_labels(ids, mask)))
            else:
                writer.add(kind(ids), mask=kind(mask if name == "mask" else [bool(counts) for counts in mask]))
        assert writer.num_counted_tokens == json.loads(wanted["out.meta.json"])["num_counted_tokens"] < writer.num_tokens
    assert_same(tmp_path / "got", wanted)
    got, want = (libxlstm.TokenData(tmp_path / folder / "out", 16) for folder in ("got", "want"))
    assert all(torch.equal(*pair) for pair in zip(got.batch(0, 9), want.batch(0, 9)))


def test_the_end_of_a_document_counts_as_it_is_said(tmp_path):
    with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
        writer.add([1, 2, 0], mask=[1, 1, 0])
        writer.add([3, 4, 0], labels=[-100, -100, 0])
        writer.add([5, 6], mask=[1, 0])
        writer.add([0], mask=[0])
        writer.add([7, 0])
    data = libxlstm.TokenData(tmp_path / "out", 10, shuffle=False, mask_loss_across_documents=False)
    ids, targets, _ = data[0]
    assert ids.tolist() == [1, 2, 0, 3, 4, 0, 5, 6, 0, 7]
    assert targets.tolist() == [2, -100, -100, -100, 0, 5, -100, -100, 7, 0]
    assert json.loads((tmp_path / "out.meta.json").read_text())["num_counted_bytes"] == 4


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", ["mask", "labels"])
def test_streams_with_masks(prepared_chats, tokenizer, tmp_path, monkeypatch, name, piece):
    rows, wanted = prepared_chats
    stream, mask = (np.array(sum(parts, [])) for parts in zip(*((ids + [0], counts + counts[-1:]) for ids, counts in rows)))
    marks = mask if name == "mask" else np.where(mask, stream, -100)
    monkeypatch.setattr(writer_module, "_PIECE", piece)
    with libxlstm.TokenWriter(tmp_path / "got" / "out", tokenizer) as writer:
        for first, end in ((0, 9), (9, 40), (40, len(stream))):
            writer.add_stream(stream[first:end], **{name: marks[first:end]})
    assert_same(tmp_path / "got", wanted)


def test_masks_that_do_not_fit_are_told(tmp_path, monkeypatch):
    with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
        for add in (writer.add, writer.add_stream):
            for wrong, message in (
                    ({"mask": [1, 1], "labels": [1, 2]}, "mask and labels: both say which ids count in the loss; give one"),
                    ({"mask": [1]}, "mask: expected as many as there are ids, 2, got 1"),
                    ({"labels": [1, 2, 3]}, "labels: expected as many as there are ids, 2, got 3"),
                    ({"mask": [0, -100]}, "mask: expected 0 or 1, got -100 at position 1"),
                    ({"mask": [0.5, 1.0]}, r"mask: expected bools, or integers 0 and 1, in one row \(T\), got float64"),
                    ({"mask": [[0], [1]]}, r"mask: expected bools, .*, got int64 of shape \(2, 1\)"),
                    ({"labels": [True, False]}, r"labels: expected integers in one row \(T\), got bool"),
                    ({"labels": [-100, 3]}, "labels: expected 2, the id itself, or -100 at position 1, got 3; they are not")):
                with pytest.raises(ValueError, match=message):
                    add([1, 2], **wrong)
        with pytest.raises(TypeError):
            writer.add([1, 2], [1, 1])
        writer.add([1])
    assert [ids.tolist() for ids in read_megatron(tmp_path / "out")[1]] == [[1, 0]] and not (tmp_path / "out.loss").exists()
    monkeypatch.setattr(writer_module, "_PIECE", 2)
    with pytest.raises(ValueError, match="this TokenWriter has ended"):  # a part of the stream is written
        with libxlstm.TokenWriter(tmp_path / "other", "bytes") as writer:
            with pytest.raises(ValueError, match="expected 4, the id itself, or -100 at position 3, got 5"):
                writer.add_stream([1, 2, 3, 4], labels=[1, 2, 3, 5])
    assert not list(tmp_path.glob("other*"))


def test_bytes_that_count_where_spaces_are_of_the_tokens_before(tmp_path):
    """A decoder that puts no space before the first token: what is said of the bytes is what prepare says."""
    tokenizers = pytest.importorskip("tokenizers")
    of_words = tokenizers.Tokenizer(tokenizers.models.BPE())
    of_words.pre_tokenizer, of_words.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    of_words.train_from_iterator(["the answer is four or ü"] * 9, tokenizers.trainers.BpeTrainer(show_progress=False))
    of_words.save(str(tmp_path / "tokenizer.json"))
    chats = [["the answer is", " four or", " ü"], ["the", " four"], [" answer"]]
    lines = [{"text": [{"text": text, "loss": i % 2 == 1} for i, text in enumerate(chat)]} for chat in chats]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("prepare", tmp_path / "t.jsonl", "--output", tmp_path / "want", "--tokenizer", tmp_path / "tokenizer.json")
    _, documents = read_megatron(tmp_path / "want")
    counted = np.fromfile(tmp_path / "want.loss", "<i8")
    mask = (counted[:, None] <= np.arange(sum(map(len, documents)))).sum(0) % 2
    with libxlstm.TokenWriter(tmp_path / "got", tmp_path / "tokenizer.json") as writer:
        for ids in documents:
            writer.add(ids, mask=mask[:len(ids)])
            mask = mask[len(ids):]
    got, want = (json.loads((tmp_path / f"{name}.meta.json").read_text()) for name in ("got", "want"))
    assert (tmp_path / "got.loss").read_bytes() == (tmp_path / "want.loss").read_bytes()
    assert got["num_counted_bytes"] == want["num_counted_bytes"] == len(" four or four")
    assert got["num_bytes"] == want["num_bytes"] - 1  # of a space before a whole text nothing is left


def test_bytes_of_characters_in_parts(tokenizer, tmp_path):
    """Of characters that are in parts no replacements are counted, nor are marks of bytes in special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    with_more = tokenizers.Tokenizer.from_file(str(tokenizer))
    with_more.add_special_tokens(["<|a ü|>", "\u0120z"])  # the latter is read as the bytes " z"
    with_more.save(str(tmp_path / "tokenizer.json"))
    text = "日本語 and<|a ü|> 😀"
    ids = Tokenizer(tmp_path / "tokenizer.json").encode(text)
    first = next(i for i in range(len(ids)) if "\ufffd" in with_more.decode(ids[:i], skip_special_tokens=False))
    with libxlstm.TokenWriter(tmp_path / "out", tmp_path / "tokenizer.json") as writer:
        writer.add(ids, mask=[0] * first + [1] * (len(ids) - first))
        writer.add(ids[:first], mask=[1] * first)
        writer.add([with_more.token_to_id("\u0120z")], mask=[0])
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert meta["num_counted_bytes"] == len(text.encode()) and meta["num_bytes"] > len(text.encode()) + 2


def test_a_stream_ends_where_a_document_is_given(tmp_path):
    with libxlstm.TokenWriter(tmp_path / "out", "bytes", eos_id=10) as writer:
        writer.add_stream(list(b"one\ntw"))
        writer.add_stream(list(b"o"))
        writer.add(list(b"th\nree"))
    assert [bytes(ids.tolist()) for ids in read_megatron(tmp_path / "out")[1]] == [b"one\n", b"two\n", b"th\nree\n"]
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert (meta["num_bytes"], meta["eos_id"], meta["tokenizer"]) == (12, 10, "bytes")


def test_arrays_that_are_used_again(tmp_path):
    buffer = np.empty(3, np.int64)
    with libxlstm.TokenWriter(tmp_path / "out", "bytes") as writer:
        for part in ([1, 2, 3], [4, 0, 5], [6, 7, 8]):
            buffer[:] = part
            writer.add_stream(buffer)
        buffer[:] = 9
        writer.add(buffer)
    assert [ids.tolist() for ids in read_megatron(tmp_path / "out")[1]] == [[1, 2, 3, 4, 0], [5, 6, 7, 8, 0], [9, 9, 9, 0]]


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


def test_chats_in_a_template_of_transformers_are_trained_on(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    fast.chat_template = ("{% for m in messages %}{{ m['role'] + ':\n' }}{% if m['role'] == 'assistant' %}"
                          "{% generation %}{{ m['content'] + '\n' }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}"
                          "{% endif %}{% endfor %}")
    roles, lines = ("user", "assistant"), []
    with libxlstm.TokenWriter(tmp_path / "written", tokenizer) as writer:
        for texts in (["x", "plain text"], ["more of it", "and", "x", "plain"]) * 9:
            messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
            made = fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            writer.add(made["input_ids"], mask=made["assistant_masks"])
            lines.append([{"text": part, "loss": loss} for i, text in enumerate(texts)
                          for part, loss in ((roles[i % 2] + ":\n", False), (text + "\n", i % 2 == 1))])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run("prepare", tmp_path / "t.jsonl", "--output", tmp_path / "prepared", "--tokenizer", tokenizer)
    losses = {}
    for name in ("written", "prepared"):
        (tmp_path / "c.yaml").write_text(
            f"run: {{name: {name}-run, out_dir: {tmp_path}, device: cpu}}\n"
            "model: {embedding_dim: 16, num_blocks: 1, num_heads: 1, vocab_size: 300}\n"
            f"data: {{train: [{{path: {tmp_path}/{name}}}], val: {tmp_path}/{name}, seq_len: 16}}\n"
            "train: {global_batch_size: 2, max_steps: 3}\noptim: {warmup_steps: 0}\n"
            "log: {every: 1, tensorboard: false, plot: false}\n")
        run_program("xlstm-train", tmp_path / "c.yaml")
        metrics = [json.loads(line) for line in (tmp_path / f"{name}-run" / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line[key] for line in metrics for key in ("train/loss_hex", "val/loss", "val/bits_per_byte")
                        if key in line]
    assert losses["written"] == losses["prepared"] and len(losses["written"]) == 5


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
