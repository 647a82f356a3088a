"""xlstm-train as a program: whole runs, what they leave in the run folder, and what it refuses."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build" / "bin" / "xlstm-train"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")

CONFIG = """
run: {{name: demo, out_dir: {out}, num_threads: 1}}
model: {{vocab_size: 256, embedding_dim: 16, num_blocks: 2, num_heads: 2, slstm_at: [1]}}
data: {{text: {text}, cache_dir: {cache}, seq_len: 16}}
train: {{global_batch_size: 4, max_steps: 12}}
optim: {{learning_rate: 1.0e-2, min_lr: 1.0e-3, warmup_steps: 3}}
ckpt: {{every: 4, keep_last: 2}}
eval: {{every: 5, batches: 4}}
sample: {{prompts: ["line "], max_new_tokens: 8}}
log: {{every: 1, plot: false}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(f"line {i * i} of a small text, {i % 7}\n" for i in range(600))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def setup(tmp_path, corpus):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(out=tmp_path / "runs", text=corpus / "text.txt", cache=corpus / "cache"))
    return config, tmp_path / "runs" / "demo"


def train(config, *arguments, failpoint=None, **options):
    environment = {**os.environ, "XLSTM_PYTHON": sys.executable}
    environment.pop("XLSTM_FAILPOINT", None)
    if failpoint:
        environment["XLSTM_FAILPOINT"] = failpoint
    return subprocess.run([PROGRAM, config, *arguments], env=environment, capture_output=True, text=True,
                          timeout=120, **options)


@contextlib.contextmanager
def another_prepares_the_text(config, cache):
    """The setting of a cache whose text another process is preparing, as it seems."""
    setting = f"data.cache_dir={cache}"
    assert train(config, setting, "train.max_steps=1", "run.name=first").returncode == 0
    (folder,) = cache.iterdir()
    (folder / "train.meta.json").unlink()
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield setting


def records(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run):
    return {r["step"]: r["train/loss_hex"] for r in records(run) if "train/loss_hex" in r}


def fingerprint(run, step):
    folder = run / "ckpt" / f"step-{step:08d}"
    return [hashlib.sha256((folder / f).read_bytes()).hexdigest()
            for f in ("model.safetensors", "optim-rank00000.safetensors")]


def one_line_error(done, code):
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("xlstm-train: error: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
    return lines[0]


def test_a_whole_run(setup):
    config, run = setup
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"held-out bits per byte: \d+\.\d\d", done.stdout.splitlines()[-1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ") and "gnorm" in line]
    assert len(lines) == 12
    assert re.fullmatch(r"step 12/12 \| loss \d\.\d{4} \| ppl [\d.]+ \| gnorm [\d.]+ \| lr 1\.0e-03 \| "
                        r"[\d.]+k? tok/s \| data \d+% \| eta 0s", lines[-1])
    assert "tok/s" not in lines[0]  # the first step is in no mean

    metrics = [r for r in records(run) if "train/loss" in r]
    assert [m["step"] for m in metrics] == list(range(1, 13))
    for key in ("train/ppl", "train/grad_norm", "train/lr", "train/tokens", "train/skipped_updates",
                "perf/tokens_per_s", "perf/step_ms", "perf/data_ms", "mem/peak_gib"):
        assert key in metrics[-1], key
    assert metrics[-1]["train/tokens"] == 12 * 4 * 16
    assert float.fromhex(metrics[-1]["train/loss_hex"]) == pytest.approx(metrics[-1]["train/loss"], rel=1e-9)
    assert [r["step"] for r in records(run) if "val/loss" in r] == [5, 10, 12]
    assert all({"val/ppl", "val/bits_per_byte"} <= r.keys() for r in records(run) if "val/loss" in r)
    assert sorted(p.name for p in (run / "ckpt").iterdir()) == ["step-00000008", "step-00000012"]
    sample = records(run, "samples.jsonl")
    assert [s["step"] for s in sample] == [12] and sample[0]["prompt"] == "line "
    header = json.loads((run / "run.json").read_text())
    assert header["device"].startswith(("cpu", "cuda"))
    assert header["versions"]["torch"] and header["threads"] == 1 and "embedding_dim: 16" in header["config"]
    assert "step 12/12" in (run / "run.log").read_text()

    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("lock", "run.log")}
    again = train(config)
    assert again.returncode == 0
    assert "finished" in again.stdout
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("lock", "run.log")}


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def parse_message(data):
    """Field number -> list of raw values of a protocol-buffer message."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = read_varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                assert kind == 2
                size, at = read_varint(data, at)
            value, at = data[at:at + size], at + size
        fields.setdefault(number, []).append(value)
    return fields


def read_events(path):
    """Events of a TensorBoard file, every checksum checked."""
    data, events = path.read_bytes(), []

    def check(bytes_, masked):
        crc = crc32c(bytes_)
        assert ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == struct.unpack("<I", masked)[0]

    while data:
        size, = struct.unpack("<Q", data[:8])
        check(data[:8], data[8:12])
        check(data[12:12 + size], data[12 + size:16 + size])
        events.append(parse_message(data[12:12 + size]))
        data = data[16 + size:]
    return events


def test_tensorboard_events_hold_the_same_numbers(setup):
    config, run = setup
    assert train(config, "train.max_steps=5").returncode == 0
    assert train(config).returncode == 0  # goes on: a second file, which says so
    first, second = sorted((run / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime)
    expected = {(r["step"], k): v for r in records(run) for k, v in r.items()
                if "/" in k and isinstance(v, (int, float))}
    found = {}
    for path in (first, second):
        events = read_events(path)
        assert events[0][3] == [b"brain.Event:2"]
        for event in events[1:]:
            assert abs(struct.unpack("<d", event[1][0])[0] - time.time()) < 600
            for value in parse_message(event[5][0])[1] if 5 in event else []:
                scalar = parse_message(value)
                found[event[2][0], scalar[1][0].decode()] = struct.unpack("<f", scalar[2][0])[0]
    assert parse_message(read_events(second)[1][7][0]) == {1: [1]} and read_events(second)[1][2] == [6]
    assert found.keys() == expected.keys()
    assert all(found[k] == pytest.approx(v, rel=1e-6) for k, v in expected.items())


@pytest.mark.parametrize("arguments, code, expected", [
    (["run.out_dir={file}"], 4, "run.out_dir="),
    (["run.out_dir=/proc/none"], 4, "cannot be written"),
    (["data.text={missing}"], 3, "missing"),
    (["data.text=", "data.train=[]"], 2, "data"),
    (["model.vocab_size=100"], 2, ">= 256"),
    (["--resume", "step-99"], 4, "step-99"),
    (["--frehs"], 2, "--fresh"),
    (["run.device=cuda"], 2, "run.device=cpu"),
])
def test_mistakes_are_one_line_before_step_one(setup, tmp_path, arguments, code, expected):
    config, run = setup
    (tmp_path / "file").write_text("x")
    arguments = [a.format(file=tmp_path / "file", missing=tmp_path / "missing.txt") for a in arguments]
    done = train(config, *arguments)
    assert expected in one_line_error(done, code)
    assert "step 1/" not in done.stdout


def test_prompts_that_the_model_does_not_know(setup, tmp_path):
    config, run = setup
    (tmp_path / "digits.txt").write_text("0123456789\n" * 100)
    tokens = tmp_path / "digits"
    assert subprocess.run([PROGRAM.parent / "xlstm-data", "prepare", tokens.with_suffix(".txt"), "--output", tokens],
                          capture_output=True).returncode == 0
    tokens.with_suffix(".meta.json").unlink()  # which knows the tokenizer
    for arguments in ([], ["--dry-run"]):
        done = train(config, "data.text=", f"data.train=[{{path: {tokens}}}]", "model.vocab_size=64", *arguments)
        assert '"line " has token 108' in one_line_error(done, 2) and "step 1/" not in done.stdout


def test_changed_settings_are_refused_on_resume(setup, tmp_path):
    config, run = setup
    assert train(config, "train.max_steps=4").returncode == 0
    assert "data.seq_len: 8 now" in one_line_error(train(config, "data.seq_len=8"), 2)
    assert "train.global_batch_size" in one_line_error(train(config, "train.global_batch_size=8"), 2)
    (tmp_path / "other.txt").write_text("another text\n" * 500)
    assert "fingerprint" in one_line_error(train(config, f"data.text={tmp_path / 'other.txt'}"), 2)
    assert "--fresh" in one_line_error(train(config, "--resume", "never"), 4)
    assert train(config, "train.max_steps=6").returncode == 0


def test_another_held_out_set_is_told_and_judged_anew(setup, tmp_path):
    config, run = setup
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for text, line in zip(texts, ("line 4 of a small text\n", "what the model has never seen\n"), strict=True):
        text.write_text(line * 40)
    by_a, by_b = (f"data.val_text={text}" for text in texts)

    def result(*arguments, told=""):
        done = train(config, *arguments)
        assert done.returncode == 0, done.stderr
        assert told in done.stderr and ("the held-out set is another one" in done.stderr) == bool(told), done.stderr
        return done.stdout.splitlines()[-1], [r["val/loss"] for r in records(run) if "val/loss" in r]

    first, judged = result(by_a)
    expected = train(config, by_b, "run.name=alone").stdout.splitlines()[-1]
    told = f"data.val_text: {texts[1]} now, {texts[0]} then"
    assert told in train(config, by_b, "--dry-run").stderr
    other, judged_anew = result(by_b, told=told)
    assert other == expected != first
    assert judged_anew[:-1] == judged and judged_anew[-1] != judged[-1]
    assert result(by_b, told=told) == (other, judged_anew)  # recorded by now
    assert result(by_a) == (first, judged_anew)  # the first set's is, too
    texts[0].write_text("what the model has never seen\n" * 40)
    assert result(by_a, "train.max_steps=13", told="(its text has changed)")[0] != first


def test_fresh_moves_nothing_before_the_new_run_can_start(setup):
    config, run = setup
    assert train(config, "train.max_steps=4").returncode == 0
    one_line_error(train(config, "--fresh", "data.text=typo.txt"), 3)
    assert "--fresh starts over; give one" in one_line_error(train(config, "--fresh", "--resume", "step-4"), 2)
    assert [path.name for path in run.parent.iterdir()] == ["demo"]
    assert "resumed from" in train(config).stdout


def test_dry_run_tells_where_the_run_would_begin(setup, tmp_path):
    config, run = setup
    assert f"start       at step 0, in {run}" in train(config, "--dry-run").stdout
    assert train(config, "train.max_steps=4").returncode == 0
    before = sorted(run.rglob("*"))
    assert re.search(r"^start .*step-00000004$", train(config, "--dry-run").stdout, re.M)
    assert re.search(r"^start .*step-00000004: this run is finished$", train(config, "--dry-run", "train.max_steps=4").stdout, re.M)
    assert "is moved aside" in train(config, "--dry-run", "--fresh").stdout
    assert "--fresh starts over" in one_line_error(train(config, "--dry-run", "--fresh", "--resume", "step-4"), 2)
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 500)
    assert "the training data is not that of" in one_line_error(train(config, "--dry-run", f"data.text={other}"), 2)
    assert "data.shuffle_seed: 5 now" in one_line_error(train(config, "--dry-run", "data.shuffle_seed=5"), 2)
    assert "holds a run" in one_line_error(train(config, "--dry-run", "--resume", "never"), 4)
    assert sorted(run.rglob("*")) == before
    (run.parent / "thesis").mkdir()
    (run.parent / "thesis" / "main.tex").write_text("x")
    assert "not a run" in one_line_error(train(config, "--dry-run", "run.name=thesis"), 4)
    (run.parent / "filed").mkdir()
    (run.parent / "filed" / "ckpt").write_text("")
    for dry in (["--dry-run"], []):
        assert "its ckpt is a file" in one_line_error(train(config, *dry, "run.name=filed"), 4)


def test_non_finite_gradient_stops(setup):
    config, run = setup
    message = one_line_error(train(config, failpoint="trainer.nan_grad:6"), 5)
    assert "step 6" in message and "samples 20 to 23" in message
    assert [p.name for p in (run / "ckpt").iterdir()] == ["step-00000004"]


def test_dry_run(setup, tmp_path):
    config, run = setup
    done = train(config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"parameters +[\d,]+ \(\d+\.\d+ M\)", done.stdout)
    assert re.search(r"per step +64 tokens", done.stdout) and re.search(r"whole run +12 steps, 768 tokens", done.stdout)
    assert "one step    loss" in done.stdout
    assert not run.exists()


def test_settings_without_effect_are_told_once(setup):
    config, folder = setup
    told = "settings without effect: model.lora.alpha=8.0 (model.lora.rank is 0), " \
           "model.mlstm.normalize=false (there is no mLSTM block)\n"
    given = ("model.slstm_at=[0,1]", "model.mlstm.normalize=false", "model.lora.alpha=8", "model.slstm.cell=lstm")
    for how in ("--dry-run", "--quiet"):
        done = train(config, *given, how)
        assert done.returncode == 0 and done.stderr.count(told) == 1, done.stderr
    assert (folder / "run.log").read_text().count(told) == 1
    assert "without effect" not in train(config, "--dry-run", "model.slstm.cell=lstm").stderr


def test_dry_run_counts_models_that_do_not_fit(tmp_path):
    config = tmp_path / "large.yaml"
    config.write_text("""
model: {kind: xlstm_large, vocab_size: 50304, embedding_dim: 4096, num_blocks: 32, num_heads: 8, norm_eps: 1.0e-6,
        output_logit_soft_cap: 30, feed_forward: {proj_factor: 2.667, round_up_to_multiple_of: 64, act_fn: silu}}
data: {train: [{path: nowhere/train}], seq_len: 8192}
train: {max_steps: 1000}
""")
    start = time.time()
    done = train(config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "6,865,424,896" in done.stdout and "not checked" in done.stdout
    assert time.time() - start < 30


def test_describe_is_the_dry_run_in_numbers(setup, tmp_path):
    config, run = setup
    numbers = json.loads(train(config, "--describe").stdout)
    assert (numbers["steps"], numbers["tokens_per_step"], numbers["tokens"]) == (12, 64, 768)
    assert numbers["training_flops"] == 3 * numbers["forward_flops_per_token"] * 768 > 0
    assert numbers["memory_bytes"] == 16 * numbers["parameters"] + numbers["activation_bytes"]
    assert f"{numbers['parameters']:,}" in train(config, "--dry-run").stdout
    assert not run.exists()
    nowhere = tmp_path / "nowhere.yaml"
    nowhere.write_text("{data: {train: [{path: nowhere/train}], seq_len: 8}, train: {max_tokens: 1000}, optim: {warmup_steps: 2}}")
    described = train(nowhere, config, "--describe")
    assert described.returncode == 0, described.stderr
    assert [json.loads(line)["steps"] for line in described.stdout.splitlines()] == [8, 12]
    assert "configuration file" in train("--describe").stderr
    nowhere.write_text("{model: {kind: lstm}, data: {reset_state_at_document: false}, run: {device: cuda}}")
    numbers = json.loads(train(nowhere, "--describe").stdout)
    unknown = [name for name, number in numbers.items() if number is None]
    assert unknown == ["training_flops", "memory_bytes", "activation_bytes", "steps", "tokens", "counted_tokens"]
    done = train(nowhere, "--dry-run", "run.device=cpu")
    assert done.returncode == 0 and re.search(r"^whole run +length not given$", done.stdout, re.M)


def test_print_config_and_help(setup):
    config, run = setup
    printed = train(config, "--print-config", "train.max_steps=77")
    assert printed.returncode == 0 and "max_steps: 77" in printed.stdout
    done = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "optim.learning_rate" in done.stdout and "75" in done.stdout
    assert done.stdout.count("Settings:") == 1 and "0 done, 1 an error of another kind, 2 config" in done.stdout
    assert "tokenizer.json, with vocab.json and merges.txt, or with encoder.json" in done.stdout


def test_plot(setup, tmp_path, monkeypatch, capsys):
    config, run = setup
    done = train(config, "log.plot=true")
    assert done.returncode == 0, done.stderr
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    assert not (run / "plot.log").exists()

    sys.path.insert(0, str(ROOT / "libxlstm"))
    try:
        import plot
    finally:
        sys.path.pop(0)
    with open(run / "metrics.jsonl", "ab") as file:  # what belongs to no step, and what a crash leaves
        file.write(b'5\n{"train/loss": 1}\n{"step": null, "train/loss": 1}\n\xff\xfe\n{"step": 12, "train/loss": nul')
    series = plot.read_series(run)
    assert series["train/loss"][0] == tuple(range(1, 13)) and len(series["val/loss"][0]) == 3
    assert plot.smooth([1.0, 2.0, 6.0, 3.0], 3) == [1.0, 3.0, pytest.approx(11 / 3), 3.0]
    plot.main([str(run), str(run), "--out", str(tmp_path / "both.svg")])
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()
    with pytest.raises(SystemExit, match="0"):
        plot.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "default: loss.png, in the run's folder, or of several runs in the current folder" in told
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(run, run.parent / "other", ignore=shutil.ignore_patterns("loss.png"))
    for runs, place in (([run], run), ([run, run.parent / "other"], Path("."))):
        (run / "loss.png").unlink(missing_ok=True)
        plot.main(list(map(str, runs)))
        assert capsys.readouterr().out == f"{place / 'loss.png'}\n" and (place / "loss.png").exists()
    assert not (run / "loss.png").exists() and not (run.parent / "other" / "loss.png").exists()
    with pytest.raises(SystemExit, match="nowhere"):
        plot.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="x.png: No such file or directory; name another"):
        plot.main([str(run), "--out", str(tmp_path / "none" / "x.png")])
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(run), "--out", str(tmp_path / "x.foo")])
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".svg", ".yaml"]


def test_a_picture_that_fails_is_a_warning(setup):
    config, run = setup
    done = subprocess.run([PROGRAM, config, "log.plot=true"], env={**os.environ, "XLSTM_PYTHON": "/bin/false"},
                          capture_output=True, text=True)
    assert done.returncode == 0
    assert "no loss.png" in done.stderr and "draw it with: /bin/false" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("held-out bits per byte")
