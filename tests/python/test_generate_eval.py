"""xlstm-generate and xlstm-eval on a small trained run, with bytes and with a tokenizer.json."""

import gzip
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libxlstm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import BIN, ROOT, TinyRun, environment, program  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = TinyRun(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("shared"), steps=60, every=20)
    run.train(check=0)
    return run


def generate(run, *args, **kwargs):
    return program("xlstm-generate", getattr(run, "path", run), *args, check=0, **kwargs).stdout


def test_prompt_from_argument_file_and_stdin_are_the_same(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("the state ")
    options = ["--max-new-tokens", 40]
    text = generate(run, "--prompt", "the state ", *options)
    assert text.startswith("the state ") and len(text) == len("the state ") + 40 + 1
    assert generate(run, "--prompt-file", tmp_path / "prompt.txt", *options) == text
    assert generate(run, *options, stdin="the state ") == text
    assert generate(run, "--prompt", "the state ", "--no-echo", *options) == text[len("the state "):]
    assert len(generate(run, *options)) > 1  # an empty prompt starts a line


def test_seed_greedy_and_samples(run):
    def text(*args):
        return generate(run, "--prompt", "the ", "--max-new-tokens", 60, *args)
    assert text("--seed", 1) == text("--seed", 1)
    assert text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1, "--threads", 1) == text("--seed", 1)
    greedy = text("--greedy")
    assert greedy == text("--greedy", "--seed", 9) == text("--top-k", 1) == text("--temperature", 0)
    assert text("--top-p", 1e-9) == greedy
    several = text("--num-samples", 3, "--seed", 5).split("---------------\n")
    assert several == [text("--seed", 5 + i) for i in range(3)]


def test_generation_continues_what_it_generated(run):
    """Greedy: taking the first half of the output into the prompt changes nothing."""
    whole = generate(run, "--prompt", "The cell", "--greedy", "--max-new-tokens", 40)
    half = whole[:len("The cell") + 20]
    assert generate(run, "--prompt", half, "--greedy", "--max-new-tokens", 20) == whole


def test_output_is_streamed_and_valid_utf8(run):
    process = subprocess.Popen([BIN / "xlstm-generate", run.path, "--prompt", "é", "--max-new-tokens", "2000",
                                "--temperature", "5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment(), bufsize=0)
    first = process.stdout.read(64)
    assert process.poll() is None, "text comes before the end"
    rest, errors = process.communicate(timeout=120)
    (first + rest).decode("utf-8")  # a wild temperature draws every byte: what is printed is text all the same
    assert process.returncode == 0
    assert re.search(rb"prompt: 2 tokens, [\d.]+ tokens/s \| decode: \d+ tokens, [\d.]+ tokens/s", errors)


def test_eval_of_the_runs_own_held_out_set(run, tmp_path):
    out = tmp_path / "eval.json"
    done = program("xlstm-eval", run.path, "--json", out, check=0)
    result = json.loads(out.read_text())
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["seq_len"] == 32 and result["tokens"] > 1000
    assert 0 < result["bits_per_byte"] < 8
    assert f"{result['loss']:.6f}" in done.stdout
    limited = tmp_path / "limited.json"
    program("xlstm-eval", run.path, "--batches", 2, "--batch-size", 4, "--json", limited, check=0)
    trained = [m for m in run.metrics() if "val/loss" in m][-1]  # eval.batches: 2 of 4 sequences, whatever the micro batch
    assert json.loads(limited.read_text())["loss"] == pytest.approx(trained["val/loss"], rel=1e-5)
    counted = json.loads(limited.read_text())["tokens"]
    for options, factor in (([], 1), (["--batch-size", 2], 0.5)):
        program("xlstm-eval", run.path, "--batches", 2, *options, "--json", limited, check=0)
        assert json.loads(limited.read_text())["tokens"] == pytest.approx(factor * counted, abs=8)  # but for ends of documents


def test_the_runs_own_held_out_set_is_the_one_it_was_judged_by(run, tmp_path):
    """Its paths begin where the run was started; another text is not taken for it."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    (work / "text.txt").write_text("The cell keeps memory slowly.\n" * 50)
    (elsewhere / "text.txt").write_text("Another text of the same name.\n" * 50)
    config = work / "config.yaml"
    config.write_text(run.config.read_text().replace(str(run.folder), "runs"))
    settings = ["data.text=text.txt", "data.cache_dir=cache", "train.max_steps=2", "optim.warmup_steps=1"]

    def call(folder, name, *arguments, check):
        done = subprocess.run([BIN / name, *arguments], cwd=folder, env=environment(), capture_output=True, text=True)
        assert done.returncode == check, done.stderr
        return done
    call(work, "xlstm-train", config, *settings, check=0)
    here = call(work, "xlstm-eval", "runs/tiny", check=0).stdout
    assert call(elsewhere, "xlstm-eval", work / "runs" / "tiny", check=0).stdout == here
    assert [path.name for path in elsewhere.iterdir()] == ["text.txt"]
    work.rename(tmp_path / "moved")  # with its text: the folder where the run was started is not there any more
    assert call(tmp_path / "moved", "xlstm-eval", "runs/tiny", check=0).stdout == here
    refused = call(elsewhere, "xlstm-eval", tmp_path / "moved" / "runs" / "tiny", check=3).stderr
    assert "was judged by another held-out set than data.text=text.txt leads to now" in refused
    assert f"relative paths begin in {elsewhere}, as the folder where the run was started is not there any more" in refused
    (tmp_path / "moved" / "text.txt").write_text("The cell keeps memory slowly.\n" * 49 + "The last line has changed.\n")
    assert "the text has changed" in call(tmp_path / "moved", "xlstm-eval", "runs/tiny", check=3).stderr
    call(tmp_path / "moved", "xlstm-eval", "runs/tiny", "--text", "text.txt", check=0)


def test_what_is_not_there_is_told_with_the_folder_where_the_run_was_started(run, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "text.txt").write_text("The cell keeps memory slowly.\n" * 50)
    (work / "held.txt").write_text("The gate forgets.\n" * 9)
    config = work / "config.yaml"
    config.write_text(run.config.read_text().replace(str(run.folder), "runs"))
    settings = ["data.text=text.txt", "data.val_text=held.txt", "data.cache_dir=cache", "train.max_steps=2",
                "optim.warmup_steps=1"]
    (tmp_path / "disk").mkdir()
    (work / "runs" / "tiny").mkdir(parents=True)
    (work / "runs" / "tiny" / "ckpt").symlink_to(tmp_path / "disk")  # where no run.json lies beside it
    done = subprocess.run([BIN / "xlstm-train", config, *settings], cwd=work, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tiny, counts, there = work / "runs" / "tiny", ["--frequency-buckets", 10], f"relative paths begin in {work}, where the run was"
    program("xlstm-eval", tiny, *counts, check=0)

    (work / "text.txt").write_text("The cell keeps nothing.\n" * 50)
    program("xlstm-eval", tiny, check=0)  # the held-out text is what it was
    refused = program("xlstm-eval", tiny, *counts, check=3).stderr
    assert "was trained on another text than data.text=text.txt leads to now" in refused and there in refused
    (work / "held.txt").write_text("The gate writes.\n" * 9)
    refused = program("xlstm-eval", tiny, check=3).stderr
    assert "was judged by another held-out set than data.val_text=held.txt leads to now" in refused and there in refused
    (work / "held.txt").unlink()
    refused = program("xlstm-eval", tiny, check=3).stderr
    assert "held.txt" in refused and there in refused


def test_numbers_names_and_files_that_cannot_be_used(run, tmp_path):
    for options in (["--batches", 2**63 - 1], ["--batch-size", 2**31], ["--threads", 200_000], ["--seq-len", 2**63 - 1]):
        assert f"{options[0]} must be at most" in program("xlstm-eval", run.path, *options, check=2).stderr
    assert "--threads must be at most" in program("xlstm-generate", run.path, "--threads", 200_000, check=2).stderr
    done = program("xlstm-generate", run.path, "--prompt-file", tmp_path, check=3)
    assert f"{tmp_path}: a folder, expected a file" in done.stderr
    config = tmp_path / "vectors.yaml"
    config.write_text("model: {input_features: 4}\n")
    assert "model.input_features is 4: only models that read tokens" in program("xlstm-bench", config, check=2).stderr
    text = os.fsencode(tmp_path) + b"/t\xff.txt"
    with open(text, "w") as file:
        file.write("The cell keeps memory.")
    done = subprocess.run([BIN / "xlstm-eval", run.path, "--text", text, "--seq-len", "100000000", "--json",
                           tmp_path / "e.json"], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr  # a window is as long as the text, not 100 million tokens
    assert json.loads((tmp_path / "e.json").read_text())["data"].endswith("/t\ufffd.txt")


def test_rounded_weights(run, tmp_path):
    rounded = libxlstm.load(run.path, dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    whole = libxlstm.load(run.path)
    for (name, x), y in zip(whole.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(x.to(torch.bfloat16), y), name
    text = generate(run, "--prompt", "the ", "--greedy", "--max-new-tokens", 50, "--dtype", "bfloat16_weights", "--no-echo")
    assert text == bytes(rounded.generate(list(b"the "), 50, temperature=0)).decode(errors="replace") + "\n"
    losses = {}
    for dtype in ("float32", "bfloat16", "bfloat16_weights"):
        program("xlstm-eval", run.path, "--dtype", dtype, "--json", tmp_path / "eval.json", check=0)
        losses[dtype] = json.loads((tmp_path / "eval.json").read_text())["loss"]
    assert len(set(losses.values())) == 3  # each rounds in its own way
    assert max(losses.values()) - min(losses.values()) < 0.02
    for name in ("xlstm-generate", "xlstm-eval"):
        assert "--dtype: expected float32" in program(name, run.path, "--dtype", "half", check=2).stderr


def test_eval_at_longer_contexts_and_on_text(run, tmp_path):
    def loss(*args):
        program("xlstm-eval", run.path, *args, "--json", tmp_path / "eval.json", check=0)
        return json.loads((tmp_path / "eval.json").read_text())
    results = [loss("--seq-len", n) for n in (8, 32, 512)]
    assert len({r["tokens"] for r in results}) == 1, "every token is scored once at any context"
    assert results[0]["loss"] > results[1]["loss"]
    assert math.isfinite(results[2]["loss"])
    for batch_size in (1, 7):
        assert loss("--batch-size", batch_size)["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)

    text = tmp_path / "text.txt"
    text.write_text("The cell keeps memory slowly and then reads.\n" * 20)
    on_text = loss("--text", text)
    assert on_text["tokens"] == len(text.read_text())  # the first byte is not scored, the end of the document is
    assert on_text["bits_per_byte"] == pytest.approx(on_text["loss"] / math.log(2), rel=2e-3)
    program("xlstm-data", "prepare", "--output", tmp_path / "tokens", text, check=0)
    assert loss("--data", tmp_path / "tokens")["loss"] == pytest.approx(on_text["loss"], rel=1e-9)


def test_eval_of_a_folder_of_sources(run, tmp_path):
    texts = {"code": "def f(x):\n    return x + 1\n" * 30, "prose": "The cell keeps memory slowly and then reads.\n" * 20}
    for name, content in texts.items():
        (tmp_path / f"{name}.txt").write_text(content)
        program("xlstm-data", "prepare", "--output", tmp_path / "sources" / name, tmp_path / f"{name}.txt", check=0)

    def judged(data, *options):
        done = program("xlstm-eval", run.path, "--data", data, "--json", tmp_path / "eval.json", *options, check=0)
        return json.loads((tmp_path / "eval.json").read_text()), done.stdout
    alone = {name: judged(tmp_path / "sources" / name)[0] for name in texts}
    together, out = judged(tmp_path / "sources")
    assert together["sources"] == {name: {key: alone[name][key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
                                   for name in texts}
    tokens = sum(each["tokens"] for each in alone.values())
    assert together["tokens"] == tokens == sum(map(len, texts.values()))
    assert together["loss"] == pytest.approx(sum(each["loss"] * each["tokens"] for each in alone.values()) / tokens)
    assert together["mean_perplexity"] == pytest.approx(sum(each["perplexity"] for each in alone.values()) / 2)
    assert re.search(r"^code +loss .*\nprose +loss .*\nmean perplexity of the 2 sources ", out)
    filled, _ = judged(tmp_path / "sources", "--fill-last")
    assert filled["tokens"] == tokens and filled["loss"] != together["loss"]
    (tmp_path / "sources" / "code").mkdir()  # beside the prefix of the same name
    beside, _ = judged(tmp_path / "sources" / "code")
    assert "sources" not in beside and beside["loss"] == alone["code"]["loss"] and beside["tokens"] == alone["code"]["tokens"]
    (tmp_path / "empty").mkdir()
    assert "holds no prepared token file" in program("xlstm-eval", run.path, "--data", tmp_path / "empty", check=3).stderr


def test_eval_by_frequency_in_the_training_text(run, tmp_path):
    out = tmp_path / "eval.json"
    done = program("xlstm-eval", run.path, "--frequency-buckets", "500,4000", "--json", out, check=0)
    result = json.loads(out.read_text())
    buckets = result["frequency"]
    assert list(buckets) == ["count_0", "count_500", "count_4000"]
    judged = [b for b in buckets.values() if b["tokens"]]
    assert sum(b["tokens"] for b in judged) == result["tokens"] and len(judged) >= 2
    assert sum(b["tokens"] * b["loss"] for b in judged) == pytest.approx(result["tokens"] * result["loss"], rel=1e-6)
    assert all(b["perplexity"] == pytest.approx(math.exp(b["loss"])) for b in judged)
    assert f"tokens that occur 500 to 3999 times: {buckets['count_500']['tokens']}" in done.stdout

    other = tmp_path / "e.txt"  # in which e alone occurs: all other tokens are in the bucket of 0
    other.write_text("e" * 50)
    program("xlstm-data", "prepare", "--output", tmp_path / "counts", other, check=0)
    program("xlstm-eval", run.path, "--frequency-buckets", 50, "--counts", tmp_path / "counts", "--json", out, check=0)
    frequency = json.loads(out.read_text())["frequency"]
    text = tmp_path / "text.txt"
    assert 0 < frequency["count_50"]["tokens"] < 0.3 * result["tokens"]
    text.write_text("eeee")
    program("xlstm-eval", run.path, "--frequency-buckets", 50, "--counts", tmp_path / "counts", "--text", text, "--json", out,
            check=0)
    assert json.loads(out.read_text())["frequency"]["count_50"]["tokens"] == 3  # the fourth target ends the document
    assert "--frequency-buckets" in program("xlstm-eval", run.path, "--counts", tmp_path / "counts", check=2).stderr
    assert "numbers above 0 that grow" in program("xlstm-eval", run.path, "--frequency-buckets", "9,3", check=2).stderr


def test_bench_tells_how_fast_a_model_generates(tmp_path):
    config = tmp_path / "model.yaml"
    config.write_text("run: {device: cpu, num_threads: 1}\n"
                      "model: {kind: llama, vocab_size: 50, embedding_dim: 16, num_blocks: 2, num_heads: 2}\n")
    program("xlstm-bench", config, "--steps", 0, "--tokens", 4, "--positions", "3,40", "--batches", "1,2", "--prompt", 5,
            "--json", tmp_path / "bench.json", check=0)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert "training" not in report and "decoding" not in report and report["seconds"] > 0
    generation, throughput = report["generation"], report["throughput"]
    times = {f"{name.format(p)}" for p in (3, 40) for name in ("token_{}_ms", "until_{}_s")}
    assert set(generation) == times | {"prompt"} and generation["prompt"] == 5
    assert min(generation["token_3_ms"], generation["token_40_ms"]) > 0
    assert 0 < generation["until_3_s"] < generation["until_40_s"]
    assert throughput["max"] == max(throughput["batch_1"], throughput["batch_2"]) > 0
    program("xlstm-bench", config, "--positions", "0", "--steps", 0, check=2)
    program("xlstm-bench", config, "--steps", 0, "--tokens", 0, "--positions", "3", check=0)
    program("xlstm-bench", config, "--steps", 0, "--tokens", 0, "--batches", "1", check=2)


def test_a_tokenizer_is_learned_from_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cell keeps the state \u00e9\n" * 20)
    made = subprocess.run([sys.executable, ROOT / "scripts" / "train_tokenizer.py", tmp_path / "text", "--vocab-size", "270",
                           "--output", tmp_path / "words.json"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    words = tokenizers.Tokenizer.from_file(str(tmp_path / "words.json"))
    assert words.get_vocab_size() == 270 and words.token_to_id("<|endoftext|>") == 0
    ids = words.encode("the cell \u00e9 x").ids
    assert words.decode(ids) == "the cell \u00e9 x" and len(ids) < 12


def test_a_tokenizer_learns_the_texts_that_a_run_reads(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")

    def learn(*arguments, check=0):
        done = subprocess.run([sys.executable, ROOT / "scripts" / "train_tokenizer.py", *map(str, arguments)],
                              capture_output=True, text=True, env=environment())
        assert done.returncode == check, done.stderr
        return done

    lines = "".join(json.dumps({"content": f"the cell keeps {i}\n", "url": "https://example.org/page"}) + "\n"
                    for i in range(300))
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    words = tmp_path / "new" / "folder" / "words.json"
    done = learn(tmp_path / "text.jsonl.gz", "--text-key", "content", "--vocab-size", 280, "--output", words)
    assert "300 documents" in done.stderr and "280 tokens" in done.stdout
    learned = tokenizers.Tokenizer.from_file(str(words))
    assert len(learned.encode("the cell keeps").ids) == 3
    assert len(learned.encode("example").ids) == 7  # of the lines, not of the texts
    piped = subprocess.run([sys.executable, ROOT / "scripts" / "train_tokenizer.py", "-", "--output", tmp_path / "piped.json",
                            "--text-key", "content", "--vocab-size", "280"], input=lines, text=True, env=environment(),
                           capture_output=True)
    assert piped.returncode == 0 and (tmp_path / "piped.json").read_bytes() == words.read_bytes()
    learn(tmp_path / "text.jsonl.gz", "--output", tmp_path / "few.json", "--text-key", "content", "--limit-bytes", 40)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "few.json")).get_vocab_size() < 300

    out = ("--output", tmp_path / "none.json")
    assert "expected at least 257" in learn("x", *out, "--vocab-size", 256, check=2).stderr
    assert "absent: no such file or folder" in learn(tmp_path / "absent", *out, check=3).stderr
    assert 'no "text", but "content", "url"' in learn(tmp_path / "text.jsonl.gz", *out, check=1).stderr
    assert "cannot make its folder" in learn("x", "--output", words / "below" / "it.json", check=1).stderr
    assert "is a folder" in learn("x", "--output", words.parent, check=1).stderr
    assert not (tmp_path / "none.json").exists()


def test_a_checkpoint_with_a_tokenizer_stands_alone(run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bytewise, run = run, TinyRun(tmp_path / "run", tmp_path / "shared", steps=30, every=30)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train([str(tmp_path / "shared" / "text.txt")], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    spec = tmp_path / "words.json"
    tokenizer.save(str(spec))
    python = {"XLSTM_PYTHON": sys.executable}
    run.train(f"data.tokenizer={spec}", "model.vocab_size=320", check=0, **python)
    file = tmp_path / "text.txt"
    file.write_text("The cell keeps memory.\n" * 50)
    program("xlstm-data", "prepare", file, "--output", tmp_path / "bytes", check=0)
    program("xlstm-data", "prepare", file, "--output", tmp_path / "words", "--tokenizer", spec, check=0, **python)
    for judged, right, wrong in ((bytewise.path, "bytes", "words"), (run.path, "words", "bytes")):
        for options in (["--data"], ["--frequency-buckets", 10, "--counts"]):  # the same ids are other text
            program("xlstm-eval", judged, *options, tmp_path / right, check=0)
            refused = program("xlstm-eval", judged, *options, tmp_path / wrong, check=3)
            assert f"{wrong}: prepared with another tokenizer" in refused.stderr
    spec.unlink()  # the checkpoint's own copy is used from here on
    checkpoint = run.checkpoints()[-1]
    assert (checkpoint / "tokenizer.json").exists()
    text = generate(checkpoint, "--prompt", "The cell 😀 ", "--max-new-tokens", 40, **python)
    assert text.startswith("The cell 😀 ")
    generate(checkpoint, "--max-new-tokens", 5, "--temperature", 3, **python)  # starts from the end-of-document token
    program("xlstm-eval", checkpoint, "--text", file, "--json", tmp_path / "e.json", check=0, **python)
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["bits_per_byte"] < result["loss"] / math.log(2), "a token holds several bytes"
