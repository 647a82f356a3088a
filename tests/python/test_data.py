"""Token files as other programs see them, and the xlstm-data program from outside."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
XLSTM_DATA = ROOT / "build" / "bin" / "xlstm-data"
GPT2 = ROOT.parent / "shared" / "data" / "gpt2-bpe"
MEGATRON_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def run(*args, check=0, stdin=""):
    done = subprocess.run([XLSTM_DATA, *map(str, args)], capture_output=True, text=True, timeout=120, input=stdin,
                          env={**os.environ, "XLSTM_PYTHON": sys.executable})
    assert done.returncode == check, done.stderr
    return done


def error(*args, check=3, stdin=""):
    """The one line that a failing call prints."""
    lines = run(*args, check=check, stdin=stdin).stderr.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("xlstm-data: error: ")
    return errors[0]


def read_megatron(prefix):
    """Documents as Megatron-LM's IndexedDataset reads them: header, lengths, pointers, document index."""
    with open(f"{prefix}.idx", "rb") as stream:
        assert stream.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", stream.read(8)) == (1,)
        dtype = np.dtype(MEGATRON_DTYPES[struct.unpack("<B", stream.read(1))[0]])
        sequences, entries = struct.unpack("<QQ", stream.read(16))
        offset = stream.tell()
    index = np.memmap(f"{prefix}.idx", mode="r")
    lengths = np.frombuffer(index, np.int32, sequences, offset)
    pointers = np.frombuffer(index, np.int64, sequences, offset + lengths.nbytes)
    documents = np.frombuffer(index, np.int64, entries, offset + lengths.nbytes + pointers.nbytes)
    assert offset + lengths.nbytes + pointers.nbytes + documents.nbytes == len(index)
    assert documents.tolist() == list(range(sequences + 1))
    tokens = np.memmap(f"{prefix}.bin", mode="r", dtype=np.uint8)
    assert lengths.sum(dtype=np.int64) * dtype.itemsize == len(tokens)
    return dtype, [np.frombuffer(tokens, dtype, n, at) for n, at in zip(lengths, pointers)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t, "meta": {"redpajama_set_name": "C4"}}) + "\n" for t in texts))
    return path


def test_closed_standard_streams_are_not_the_files_that_it_writes(tmp_path):
    (tmp_path / "t.txt").write_text("words\n" * 1000)
    run("prepare", tmp_path / "t.txt", "--output", tmp_path / "open")
    for closed in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", XLSTM_DATA, "prepare", tmp_path / "t.txt", "--output"]
        assert subprocess.run([*command, tmp_path / "t"]).returncode == 0
        for suffix in (".bin", ".idx"):
            assert (tmp_path / ("t" + suffix)).read_bytes() == (tmp_path / ("open" + suffix)).read_bytes()


def test_bytes_round_trip_through_numpy(tmp_path):
    texts = ["plain", "Grüße €😀", "line\r\nend\x00nul", " " * 70000]
    run("prepare", write_jsonl(tmp_path / "t.jsonl", texts), "--output", tmp_path / "out")
    dtype, documents = read_megatron(tmp_path / "out")
    assert dtype == np.uint16
    assert [bytes(d.astype(np.uint8)) for d in documents] == [t.encode() + b"\0" for t in texts]
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    for name in ("bin", "idx"):
        assert meta[f"{name}_sha256"] == hashlib.sha256((tmp_path / f"out.{name}").read_bytes()).hexdigest()
    assert meta["num_bytes"] == sum(len(t.encode()) for t in texts)
    assert meta["num_documents"] == 4 and meta["vocab_size"] == 256 and meta["eos_id"] == 0
    assert meta["max_token_id"] == 0xF0 and meta["source_documents"] == {"C4": 4}
    assert meta["command"].startswith("xlstm-data prepare ")


def test_inputs_are_read_in_the_order_given_and_the_output_is_named(tmp_path):
    for name in ("a=1.txt", "b.txt", "c=3.txt"):
        (tmp_path / name).write_text(name[0])
    done = subprocess.run([XLSTM_DATA, "prepare", "a=1.txt", "b.txt", "c=3.txt", "--output", "q/x.bin"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "wrote q/x.bin, .idx and .meta.json" in done.stdout
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["x.bin", "x.idx", "x.meta.json"]
    assert b"".join(bytes(d.astype(np.uint8)) for d in read_megatron(tmp_path / "q" / "x")[1]) == b"a\0b\0c\0"
    assert "q/NAME" in error("prepare", tmp_path / "b.txt", "--output", f"{tmp_path}/q/", check=2)
    own = tmp_path / "own.bin"
    own.write_text("a text whose name is that of the output")
    for inputs in (own, tmp_path):
        assert "own.bin is read and would be overwritten" in error("prepare", inputs, "--output", tmp_path / "own", check=2)
    assert own.read_text().startswith("a text")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finished_token_files_are_replaced_where_that_is_asked_for(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    out = tmp_path / "data" / "out"
    first = ("prepare", tmp_path / "a.txt", "--output", out)
    run(*first)
    made = contents(out.parent)
    message = error("prepare", tmp_path / "b.txt", "--output", out, check=2)
    made_by = f"another command (1 documents, 7 tokens): xlstm-data prepare {tmp_path}/a.txt"
    assert f"{out}.bin is there already, made by {made_by}" in message
    assert message.endswith("replace it (--overwrite of xlstm-data, overwrite=True in Python)")
    run(*first)  # makes the same
    assert contents(out.parent) == made
    (tmp_path / "a.txt").write_text("another")
    assert "made by this command (1 documents, 7 tokens), but of other input, or" in error(*first, check=2)
    assert contents(out.parent) == made
    run(*first, "--overwrite")
    assert documents_of(out) == ["another"]
    run(*first)
    run("prepare", tmp_path / "b.txt", "--output", f"{out}.bin", "--overwrite")
    assert documents_of(out) == ["text b"]
    piped = ("prepare", "-", "--output", tmp_path / "piped")
    run(*piped, stdin="one")
    assert "by this command (1 documents, 4 tokens), but whether of" in error(*piped, check=2, stdin="one")


def test_what_made_a_token_file_may_be_unknown(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    command = ("prepare", tmp_path / "a.txt", "--output", tmp_path / "train")
    (tmp_path / "train.bin").write_bytes(b"nanoGPT's")
    assert "train.bin is there already, made by what is not known" in error(*command, check=2)
    assert (tmp_path / "train.bin").read_bytes() == b"nanoGPT's"
    run(*command, "--overwrite")
    meta = tmp_path / "train.meta.json"
    meta.write_text(meta.read_text().replace('"inputs_sha256"', '"other"'))  # as an earlier version wrote it
    assert "cannot be told" in error(*command, check=2)
    meta.write_text("{")
    assert "made by what is not known" in error(*command, check=2)


def test_an_interrupted_preparation_goes_on(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("more")
    command = ("prepare", tmp_path / "a.txt", "--output", tmp_path / "out")
    run(*command)
    meta = tmp_path / "out.meta.json"
    meta.rename(tmp_path / "out.meta.json.tmp")  # as between two renames, of which the sidecar's is the last
    assert "by another command" in error("prepare", tmp_path / "b.txt", "--output", tmp_path / "out", check=2)
    (tmp_path / "out.idx").unlink()
    run(*command)
    assert documents_of(tmp_path / "out") == ["text"] and meta.exists()
    for path in tmp_path.glob("out*"):
        path.unlink()
    (tmp_path / "out.bin.tmp").write_bytes(b"what a killed process had written")
    run("prepare", tmp_path / "b.txt", "--output", tmp_path / "out")
    assert documents_of(tmp_path / "out") == ["more"]


def test_a_token_file_of_another_tokenizer_at_the_same_place(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("a")
    command = ("prepare", tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json")
    for end in ("b", "c"):
        model = tokenizers.models.WordLevel({"a": 0, end: 1}, unk_token="a")
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        if end == "b":
            run(*command)
    assert "by this command (1 documents, 1 tokens), but with another tokenizer" in error(*command, check=2)


def test_large_vocabulary_through_numpy(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(70000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    done = run("prepare", write_jsonl(tmp_path / "t.jsonl", ["w69999 w1", "nope w65536"]), "--output", tmp_path / "out",
               "--tokenizer", tmp_path)
    assert "no end-of-document token" in done.stderr
    dtype, documents = read_megatron(tmp_path / "out")
    assert dtype == np.int32
    assert [d.tolist() for d in documents] == [[69999, 1], [0, 65536]]


def test_trained_bpe_equals_the_package(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source = Path(__file__).read_text()
    tokenizer = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator([source], vocab_size=400, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(tmp_path))
    texts = [source, "Grüße €😀", " a  b\n\n c"]
    run("prepare", write_jsonl(tmp_path / "t.jsonl", texts), "--output", tmp_path / "out", "--tokenizer", tmp_path)
    _, documents = read_megatron(tmp_path / "out")
    end = tokenizer.token_to_id("<|endoftext|>")
    assert [d.tolist() for d in documents] == [tokenizer.encode(t).ids + [end] for t in texts]
    assert [tokenizer.decode(d[:-1].tolist(), skip_special_tokens=False) for d in documents] == texts
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    files = [hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in ("vocab.json", "merges.txt")]
    assert meta["tokenizer_sha256"] == hashlib.sha256("".join(files).encode()).hexdigest()


def test_gpt2_files(tmp_path):
    pytest.importorskip("tokenizers")
    if not GPT2.is_dir():
        pytest.skip("GPT-2's encoder.json and vocab.bpe are not beside the checkout")
    texts = ["Hello world", " Hello  world\n", "<|endoftext|>"]
    run("prepare", write_jsonl(tmp_path / "t.jsonl", texts), "--output", tmp_path / "out", "--tokenizer", GPT2)
    _, documents = read_megatron(tmp_path / "out")
    assert [d.tolist() for d in documents] == [
        [15496, 995, 50256], [18435, 220, 995, 198, 50256], [50256, 50256]]


def test_folder_and_glob(tmp_path):
    for name in ("a.py", "sub/b.py", "c.txt", ".hidden/d.py"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(name)
    run("prepare", tmp_path / "t", "--glob", "*.py", "--output", tmp_path / "out", "--no-eos")
    _, documents = read_megatron(tmp_path / "out")
    assert [bytes(d.astype(np.uint8)).decode() for d in documents] == ["a.py", "sub/b.py"]


def test_report_stats_and_verify(tmp_path):
    lines = ['{"text": "four"}', '{"text": ""}', "broken", '{"text": "seven77", "meta": {"redpajama_set_name": "C4"}}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    done = run("prepare", tmp_path / "t.jsonl", "--output", tmp_path / "out")
    assert "2 documents, 13 tokens from 11 bytes" in done.stdout
    assert "left out: 1 empty and 1 bad documents" in done.stdout
    assert "t.jsonl:3: not a JSON object (skipped)" in done.stderr
    stats = run("stats", tmp_path / "out").stdout
    for part in ("tokens: 13", "documents: 2", "min 5, median 6.5, mean 6.5, max 8", "source: C4: 1", "(0.846 per token)",
                 "vocabulary: 256, largest id used 118, end of document 0"):
        assert part in stats
    assert "good: 13 tokens in 2 documents" in run("verify", tmp_path / "out").stdout


def test_verify_names_the_damaged_file(tmp_path):
    run("prepare", write_jsonl(tmp_path / "t.jsonl", ["some text", "more"]), "--output", tmp_path / "out")
    for name in ("out.bin", "out.idx"):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(good[:-1] + bytes([good[-1] ^ 64]))
        assert name in error("verify", tmp_path / "out")
        (tmp_path / name).write_bytes(good[:-2])
        assert f"{name}: " in error("verify", tmp_path / "out")
        (tmp_path / name).write_bytes(good)
    run("verify", tmp_path / "out")
    (tmp_path / "out.meta.json").unlink()
    assert "no sha256 to compare with" in error("verify", tmp_path / "out")


def test_wrong_input_exits_3(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("a")
    out = ("--output", tmp_path / "out")
    assert "no such file or folder" in error("prepare", tmp_path / "nope", *out)
    assert "no text in it (1 files, 1 empty" in error("prepare", tmp_path / "empty.txt", *out)
    assert "no such tokenizer" in error("prepare", tmp_path / "a.txt", *out, "--tokenizer", "gpt5")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "bad.jsonl:2: not valid JSON at byte 10" in error("prepare", tmp_path / "bad.jsonl", *out, "--strict")
    assert not list(tmp_path.glob("out*"))
    assert "out.idx: no such file" in error("stats", tmp_path / "out")


def test_wrong_usage_exits_2(tmp_path):
    for args, part in (((), "which command"), (("prepare",), "no INPUT"), (("prepare", "x"), "--output PREFIX is missing"),
                       (("frobnicate",), "unknown command"), (("verify",), "no PREFIX"), (("stats",), "no PREFIX"),
                       (("stats", "--strict", "x"), "takes no --strict"), (("prepare", "--strikt"), "--strict"),
                       (("show",), "no INPUT"), (("show", "x", "--no-eos"), "takes no --no-eos"),
                       (("prepare", "x", "--output", "y", "--limit-bytes", "1"), "takes no --limit-bytes"),
                       (("show", "x", "--limit-bytes", "-1"), "at least 0"), (("show", "x", "--overwrite"), "no --overwrite"),
                       (("show", "x", "--format", "json"), "expected auto, text or jsonl")):
        assert part in error(*args, check=2)
    text = run("--help").stdout
    for word in ("prepare", "verify", "stats", "show", "--tokenizer", "--glob", "--no-eos", "--strict", "--overwrite", "--format",
                 "--text-key", "--split-at", "--limit-bytes", "exit status"):
        assert word in text


def shown(*args, stdin=""):
    return [json.loads(line) for line in run("show", *args, stdin=stdin).stdout.split("\n")[:-1]]


def documents_of(prefix):
    return [bytes(d.astype(np.uint8)).decode()[:-1] for d in read_megatron(prefix)[1]]


def test_gzip_is_read_as_it_stands(tmp_path):
    texts = ["one", "Grüße €😀\n"] + [f"{i}" * (i % 50) for i in range(5000)]
    lines = write_jsonl(tmp_path / "plain", [text for text in texts if text]).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # two members
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("a text\n".encode()))
    run("prepare", tmp_path / "a.jsonl.gz", tmp_path / "b.txt.gz", "--output", tmp_path / "out", "--strict")
    assert documents_of(tmp_path / "out") == [text for text in texts if text] + ["a text\n"]


def test_standard_input(tmp_path):
    out = tmp_path / "out"
    lines = write_jsonl(tmp_path / "t", ["one", "two"]).read_text()
    for stdin, arguments, want in (
            ("a text\nof lines", (), ["a text\nof lines"]), (lines, (), ["one", "two"]), ("\n " + lines, (), ["one", "two"]),
            (lines, ("--format", "text"), [lines]), ('{"b": "three"}', ("--text-key", "b"), ["three"]),
            (lines * 40000, (), ["one", "two"] * 40000), ("x" * 3_000_000, (), ["x" * 3_000_000])):
        run("prepare", "-", "--output", out, "--strict", "--overwrite", *arguments, stdin=stdin)
        assert documents_of(out) == want
        assert shown("-", *arguments, stdin=stdin) == want
    (tmp_path / "file.txt").write_text("a file")
    assert shown(tmp_path / "file.txt", "-", stdin="and a pipe") == ["a file", "and a pipe"]
    assert json.loads((tmp_path / "out.meta.json").read_text())["source_documents"] == {"standard input": 1}
    assert "-: no text in it (1 files, 1 empty" in error("prepare", "-", "--output", tmp_path / "other")
    assert "standard input:2: not a JSON object; repair it" in error(
        "prepare", "-", "--output", tmp_path / "other", "--strict", "--format", "jsonl", stdin='{"text": "a"}\nb\n')
    with open(tmp_path / "file.txt", "rb") as stream:  # not a pipe
        done = subprocess.run([XLSTM_DATA, "show", "-"], stdin=stream, capture_output=True, text=True)
    assert done.stdout == '"a file"\n'


def test_a_text_under_another_key(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": 1, "content": "one", "meta": {}}\n{"id": 2, "content": "two"}\n')
    out = ("--output", tmp_path / "out")
    message = error("prepare", tmp_path / "t.jsonl", *out)
    assert 't.jsonl:1: no "text", but "id", "content", "meta"; say which key' in message and "--text-key" in message
    run("prepare", tmp_path / "t.jsonl", *out, "--text-key", "content", "--strict")
    assert documents_of(tmp_path / "out") == ["one", "two"]
    (tmp_path / "held_out.txt").write_text("held out")
    (tmp_path / "c.yaml").write_text(
        f"data: {{text: {tmp_path}/t.jsonl, val_text: {tmp_path}/held_out.txt, text_key: content, cache_dir: {tmp_path}/cache,"
        " seq_len: 4}\nmodel: {embedding_dim: 16, num_blocks: 1, num_heads: 1}\ntrain: {max_steps: 200}\nrun: {device: cpu}\n")
    done = subprocess.run([XLSTM_DATA.parent / "xlstm-train", tmp_path / "c.yaml", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tokens,) = (tmp_path / "cache").glob("*/train.bin")
    assert documents_of(tokens.with_suffix("")) == ["one", "two"]


@pytest.mark.parametrize("name, compressed, remedy", (
    ("t.txt", gzip.compress, "gzip data, not text; rename the file"),
    ("t.jsonl", gzip.compress, "gzip data, not text; rename the file"),
    ("t.txt.bz2", bz2.compress, "bzip2 data, not text; pipe it: bzcat {} | xlstm-data prepare - --output PREFIX"),
    ("a name.jsonl.xz", lzma.compress, "xz data, not text; pipe it: xzcat {} | xlstm-data prepare - --output PREFIX"),
    ("train.bin", lambda text: np.arange(99, dtype=np.uint16).tobytes(), "binary data, not text; if these are ids of"),
))
def test_what_is_not_text_is_told(tmp_path, name, compressed, remedy):
    (tmp_path / name).write_bytes(compressed(b'{"text": "words"}\n' * 100))
    done = run("prepare", tmp_path / name, "--output", tmp_path / "out", check=3)
    path = str(tmp_path / name)
    assert done.stderr.startswith(f"xlstm-data: error: {path}: {remedy.format(shlex.quote(path))}")
    assert done.stderr.count("not text") == done.stderr.count("\n") == 1 and "leave it out" not in done.stderr


def save_to_disk(folder):
    """What datasets.Dataset.save_to_disk leaves, but for the tables behind the first bytes."""
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x78\1\0\0\x10\0\0\0")


def test_a_folder_with_what_is_not_text_is_refused(tmp_path):
    save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "a.txt").write_bytes(b"\xff")  # would be a bad document
    (tmp_path / "saved" / "note.txt").write_text("a text")
    out = ("--output", tmp_path / "out")
    for inputs in (tmp_path / "saved", tmp_path / "saved" / "*"):
        done = run("prepare", inputs, *out, check=3)
        (line,) = done.stderr.splitlines()  # before anything is read
        assert ".arrow: an Arrow stream (as datasets writes it), not text; pipe it as JSONL: python -c" in line
        assert line.endswith("; or leave it out: name the texts by a pattern ('FOLDER/*.txt'), or give xlstm-data a --glob "
                             "('*.txt')")
    assert not list(tmp_path.glob("out*"))
    run("prepare", tmp_path / "saved", *out, "--glob", "*.txt")
    assert documents_of(tmp_path / "out") == ["a text"]
    run("prepare", tmp_path / "saved" / "n*.txt", *out, "--overwrite")
    assert "Arrow stream" in error("show", tmp_path / "saved")
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "t.jsonl.gz").write_bytes(gzip.compress(b"PAR1\x15\0\x15"))
    assert "t.jsonl.gz: a Parquet file, not text" in error("prepare", tmp_path / "gz", "--output", tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file", "Arrow stream"])
def test_commands_that_make_text_of_tables_can_be_typed(tmp_path, kind):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table, path = pandas.DataFrame({"id": [1, 2], "text": ["one/two", "drei \u2028 €"]}), tmp_path / "a table"
    if kind == "Parquet":
        table.to_parquet(path)
    elif kind == "Arrow file":
        table.to_feather(path)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_pandas(table).save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    message = error("prepare", path, "--output", tmp_path / "out")
    command = re.search("pipe it as JSONL: (python -c .* --output PREFIX)", message).group(1)
    python = Path(sys.executable).parent  # python and what it finds
    done = subprocess.run(command.replace("PREFIX", str(tmp_path / "out")), shell=True, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{python}:{XLSTM_DATA.parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    assert documents_of(tmp_path / "out") == list(table["text"])


def test_json_that_is_read_as_text_is_told(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "zwei €"}]))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "package.json").write_text("{}")  # of a folder anything may be text
    out = ("--output", tmp_path / "out", "--overwrite")
    for inputs in (tmp_path / "a.json", tmp_path / "a*.json"):
        done = run("prepare", inputs, *out)
        assert f"warning: {inputs}: read as text, JSON as it stands; if each line is a JSON object" in done.stderr
    for arguments in ((tmp_path / "t",), (tmp_path / "a.json", "--format", "text")):
        assert "warning" not in run("prepare", *arguments, *out).stderr
    command = re.search("of an array make such lines: python (-c .*) FILE > FILE.jsonl", done.stderr).group(1)
    lines = subprocess.run([sys.executable, *shlex.split(command), tmp_path / "a.json"], capture_output=True, check=True).stdout
    (tmp_path / "a.json.jsonl").write_bytes(lines)
    assert "warning" not in run("prepare", tmp_path / "a.json.jsonl", *out).stderr
    assert documents_of(tmp_path / "out") == ["one", "zwei €"]


def test_a_named_pipe_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = error("prepare", tmp_path / "pipe", "--output", tmp_path / "out")
    assert "pipe: a pipe, which is read as standard input alone; give - and pipe it" in message


def test_a_limit_on_the_size_of_files_is_told(tmp_path):
    (tmp_path / "t.txt").write_text("words\n" * 100000)
    done = subprocess.run(["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", XLSTM_DATA, "prepare", tmp_path / "t.txt", "--output",
                           tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 3 and "cannot write" in done.stderr and "File too large" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_lists_of_ids_are_told(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"input_ids": [34, 7], "attention_mask": [1, 1]}\n')
    message = error("prepare", tmp_path / "t.jsonl", "--output", tmp_path / "out", "--text-key", "input_ids")
    assert '"input_ids" is a list of numbers, not text; if they are ids of tokens, libxlstm.TokenWriter' in message


def test_a_text_is_split_where_a_line_matches(tmp_path):
    (tmp_path / "wiki").write_text(" \n = One = \n\n = = Part = = \n\nwords\n = Two = \nmore\n")
    run("prepare", tmp_path / "wiki", "--output", tmp_path / "out", "--split-at", "^ = [^=]")
    assert documents_of(tmp_path / "out") == [" \n = One = \n\n = = Part = = \n\nwords\n", " = Two = \nmore\n"]
    assert "not a regular expression" in error("show", tmp_path / "wiki", "--split-at", "[", check=2)


def test_documents_are_shown_as_they_are_prepared(tmp_path):
    texts = ["plain", "Grüße €😀", "line\r\nend\x00nul", '"quoted" \\ \u2028']
    (tmp_path / "t").mkdir()
    write_jsonl(tmp_path / "t" / "a.jsonl", texts)
    (tmp_path / "t" / "b.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "t" / "c.txt").write_bytes(b"\xff")
    done = run("show", tmp_path / "t")
    assert [json.loads(line) for line in done.stdout.split("\n")[:-1]] == [*texts, "marked"]
    assert "c.txt:1: invalid UTF-8 at byte 1" in done.stderr
    assert shown(tmp_path / "t", "--glob", "*.txt") == ["marked"]
    assert shown(tmp_path / "t", "--limit-bytes", 5) == ["plain"]
    assert shown(tmp_path / "t", "--limit-bytes", 8) == ["plain", "Gr"]  # no half of a character
    assert shown(tmp_path / "t", "--limit-bytes", 9) == ["plain", "Grü"]
    library = shown("python-stdlib", "--limit-bytes", 200_000)
    assert sum(len(text.encode()) for text in library) == pytest.approx(200_000, abs=4)
    assert any("import" in text for text in library)
    (tmp_path / "endless.jsonl").write_text('{"text": "words"}\n' * 200_000)
    command = [XLSTM_DATA, "show", tmp_path / "endless.jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as head:
        head.stdout.readline()
        head.stdout.close()
        assert head.stderr.read() == b"" and head.wait(timeout=60) == 141


def test_path_with_an_equals_sign(tmp_path):
    (tmp_path / "lang=en.txt").write_text("text")
    done = subprocess.run([XLSTM_DATA, "prepare", "lang=en.txt", "--output", "out"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "out.meta.json").exists()
