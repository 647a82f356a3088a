"""Prompts that are read and not counted: from JSONL to training, evaluation and libxlstm.TokenData."""

import json
import math
import random
import subprocess

import numpy as np
import pytest
import torch
from test_data import XLSTM_DATA, error, run, shown
from test_distributed import together
from test_train import PROGRAM, fingerprint, losses, records, train

import libxlstm

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="build/bin/xlstm-train is not built")

SETTINGS = """\
run: {{name: r, out_dir: {folder}, device: cpu, num_threads: 1}}
model: {{embedding_dim: 32, num_blocks: 2, num_heads: 2, slstm_at: [1], dropout: 0}}
data: {{text: {folder}/t.jsonl, text_key: answer, prompt_key: question, cache_dir: {folder}/cache, seq_len: {seq_len}}}
train: {{global_batch_size: 4, max_steps: 8}}
optim: {{learning_rate: 3.0e-3, min_lr: 0, warmup_steps: 1}}
ckpt: {{every: 4}}
eval: {{every: 4}}
log: {{every: 1, tensorboard: false, plot: false}}
"""


def write_pairs(path, count=300):
    """Questions of many lengths, answers of one to three letters."""
    rng = random.Random(3)
    pairs = [("?" * rng.randint(1, 40), rng.choice("abc") * rng.randint(1, 3)) for _ in range(count)]
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    return pairs


@pytest.fixture
def setup(tmp_path):
    write_pairs(tmp_path / "t.jsonl")
    (tmp_path / "c.yaml").write_text(SETTINGS.format(folder=tmp_path, seq_len=24))
    return tmp_path / "c.yaml", tmp_path / "r"


def by_hand(model, batch):
    """Mean loss over the targets that count, from logits alone."""
    ids, targets, reset = batch
    logits = model(ids, reset=reset)[0].log_softmax(-1)
    counts = targets != -100
    return -logits[counts].gather(1, targets[counts][:, None]).sum() / max(1, counts.sum().item()), counts


def test_words_of_an_answer_stay_apart():
    """Whatever puts the space before a word: of a text that goes on, the first word alone has none of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    from libxlstm.tokenizer_worker import for_inside

    pre = tokenizers.pre_tokenizers
    for parts in ([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="always")], [pre.Metaspace(prepend_scheme="always")],
                  [pre.WhitespaceSplit(), pre.ByteLevel(add_prefix_space=True)], [pre.ByteLevel(add_prefix_space=True)]):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre.Sequence(parts)
        tokenizer.train_from_iterator(["a b c answer is four red"] * 9, tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
        mark = "\u2581" if "Metaspace" in str(parts[-1]) else "\u0120"
        text = "".join(for_inside(tokenizer).encode("the answer is four").tokens)
        assert text.count(mark) >= 3, text


def test_held_out_text_that_does_not_count_stops_before_the_first_step(setup, tmp_path):
    config, folder = setup
    lines = [{"question": "?" * 500, "answer": "a"} for _ in range(30)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for more in ((), ("--dry-run",)):
        done = train(config, f"data.val_text={tmp_path}/v.jsonl", "eval.batches=1", *more)
        assert done.returncode == 3 and "none of the first 4 windows" in done.stderr and "eval.batches" in done.stderr
    assert not (folder / "metrics.jsonl").exists() or not losses(folder)
    assert train(config, f"data.val_text={tmp_path}/v.jsonl").returncode == 0


def test_prepared_prompts_in_files_that_others_read(tmp_path):
    pairs = write_pairs(tmp_path / "t.jsonl", 40)
    keys = ("--text-key", "answer", "--prompt-key", "question")
    done = run("prepare", tmp_path / "t.jsonl", "--output", tmp_path / "out", *keys)
    counted = sum(len(a) + 1 for _, a in pairs)  # the end of each, too
    assert "out.bin, .idx, .loss and .meta.json" in done.stdout
    assert f"of these {counted} tokens and {counted - 40} bytes count in the loss" in done.stdout
    assert ".bin, .idx and .loss as recorded" in run("verify", tmp_path / "out").stdout
    assert f"tokens that count in the loss: {counted}\n" in run("stats", tmp_path / "out").stdout
    tokens = np.fromfile(tmp_path / "out.bin", "<u2")
    assert bytes(tokens.astype("u1")).decode() == "".join(q + a + "\0" for q, a in pairs)
    mask = np.concatenate([[False] * len(q) + [True] * (len(a) + 1) for q, a in pairs])
    borders = np.fromfile(tmp_path / "out.loss", "<i8")
    assert ((borders[:, None] <= np.arange(len(tokens))).sum(0) % 2 == 1).tolist() == mask.tolist()
    assert shown(tmp_path / "t.jsonl", *keys) == [[{"text": q, "loss": False}, {"text": a, "loss": True}] for q, a in pairs]

    data = libxlstm.TokenData(tmp_path / "out", 16, shuffle=False)
    assert (data.num_tokens, data.num_counted_tokens) == (len(tokens), counted)
    _, targets, _ = data.batch(0, len(data))
    want = np.where(mask[1:], tokens[1:].astype(np.int64), -100)[:targets.numel()]
    assert targets.flatten().tolist() == want.tolist()

    (tmp_path / "out.loss").write_bytes((tmp_path / "out.loss").read_bytes()[:-8])
    with pytest.raises(libxlstm.Error, match="out.loss: ends at token .* of .*: it is truncated"):
        libxlstm.TokenData(tmp_path / "out", 16)


def test_bad_prompts_are_told(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"question": "q", "text": "a"}\n{"q": "q", "text": "a"}\n{"question": 1, "text": "a"}\n'
                                      '{"question": "", "text": [{"text": "a", "loss": "no"}]}\n')
    out = ("--output", tmp_path / "out")
    done = run("prepare", tmp_path / "t.jsonl", *out, "--prompt-key", "question")
    for line in ('t.jsonl:2: no "question", but "q", "text"; say which key has the prompt (--prompt-key KEY',
                 't.jsonl:3: "question" is not a string',
                 't.jsonl:4: segment 1 of "text" has a "loss" that is not true or false; write each as {"text"'):
        assert line in done.stderr
    (tmp_path / "t.txt").write_text("plain")
    assert "t.txt: is a plain text" in error("prepare", tmp_path / "t.txt", *out, "--prompt-key", "q", check=2)
    assert 'the same key, "text"' in error("show", tmp_path / "t.jsonl", "--prompt-key", "text", check=2)
    (tmp_path / "c.yaml").write_text(SETTINGS.format(folder=tmp_path, seq_len=24))
    for setting, message in ((f"data.text={tmp_path}/t.txt", "t.txt: is a plain text"),
                             ("data.prompt_key=answer", "is answer, as data.text_key is"),
                             (f"data.val_text={tmp_path}/t.txt", "t.txt: is a plain text")):
        done = train(tmp_path / "c.yaml", setting, "--dry-run")
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_training_counts_answers_alone(setup):
    config, run_folder = setup
    sizes = {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "slstm_at": [1], "dropout": 0}
    model = libxlstm.make_model({"model": sizes})
    model.save(run_folder.parent / "first")
    for micro in (4, 1):  # in micro batches that count differently
        still = [f"train.init_from={run_folder.parent}/first", "optim.learning_rate=1e-30", f"train.micro_batch_size={micro}"]
        done = train(config, *still, f"run.name=micro{micro}")
        assert done.returncode == 0, done.stderr
        own = [float.fromhex(loss) for loss in losses(run_folder.parent / f"micro{micro}").values()]
        (prefix,) = (path.with_suffix("") for path in (run_folder.parent / "cache").glob("*/train.bin"))
        data = libxlstm.TokenData(prefix, 24)
        batches = list(data.batches(4, steps=8))
        assert len({(targets != -100).sum().item() for row in batches for targets in row[1]}) > 3
        with torch.no_grad():
            assert own == pytest.approx([by_hand(model, batch)[0].item() for batch in batches], abs=1e-5)
    assert f"{data.num_tokens:,} tokens, of which {data.num_counted_tokens:,} count" in done.stdout.replace("_", ",")


def test_no_gradient_of_prompts(setup):
    config, run_folder = setup
    assert train(config, "--dry-run").returncode == 0
    (prefix,) = (path.with_suffix("") for path in (run_folder.parent / "cache").glob("*/train.bin"))
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "dropout": 0}})
    batch = libxlstm.TokenData(prefix, 24).batch(0, 4)
    loss, counts = by_hand(model, batch)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    model.loss(batch[0], batch[1], reset=batch[2]).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert 0 < counts.sum() < counts.numel() / 2
    # A letter that stands in prompts alone is never wanted: its row of the head is only pushed away.
    head = dict(model.named_parameters())["lm_head.weight"].grad[ord("?")]
    states = model.hidden(batch[0], reset=batch[2])[0][counts]
    shares = model.logits(states).softmax(-1)[:, ord("?"), None]
    torch.testing.assert_close(head, (shares * states).sum(0) / counts.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("carry", ("false", "true"))
def test_two_processes_and_an_interruption_are_one_run(setup, carry):
    config, run_folder = setup
    settings = [f"train.carry_state={carry}"]
    assert train(config, *settings, "train.micro_batch_size=2", "run.name=alone").returncode == 0
    stopped = together(config, *settings, failpoint="trainer.raise_sigterm:5")
    assert [status for _, _, status in stopped] == [75, 75], stopped
    assert [status for _, _, status in together(config, *settings)] == [0, 0]
    alone = run_folder.parent / "alone"
    assert losses(run_folder) == losses(alone) and len(losses(alone)) == 8
    assert fingerprint(run_folder, 8) == fingerprint(alone, 8)


def check_that_batches_in_which_nothing_counts_change_nothing(config, run_folder, processes, *settings):
    settings = [*settings, "data.seq_len=4", f"train.global_batch_size={processes}", "train.max_steps=40", "ckpt.every=1",
                "ckpt.keep_last=40", "optim.min_lr=1.0e-3", "log.tensorboard=true", "log.console=plain"]
    ended = together(config, *settings, size=processes)
    assert [status for _, _, status in ended] == [0] * processes, ended
    data = libxlstm.TokenData(next((run_folder.parent / "cache").glob("*/train.bin")).with_suffix(""), 4)
    shares = [(targets != -100).any(1).tolist() for _, targets, _ in data.batches(processes, steps=40)]  # of each process
    counts = [any(share) for share in shares]
    steps = {r["step"]: r for r in records(run_folder) if "train/lr" in r}
    assert len(steps) == 40 and 0 < sum(counts) < 40 and (processes == 1 or any(sum(share) == 1 for share in shares))
    weights = [(run_folder / "ckpt" / f"step-{step:08d}" / "model.safetensors").read_bytes() for step in range(1, 41)]
    lines = [line for line in ended[0][0].splitlines() if line.startswith("step ")]
    for step, counted in enumerate(counts, 1):
        told = {key for key in steps[step] if key.startswith("train/")} & {"train/loss", "train/loss_hex", "train/ppl",
                                                                           "train/grad_norm"}
        assert len(told) == (4 if counted else 0), steps[step]
        assert ("| loss - | gnorm - |" in next(line for line in lines if line.startswith(f"step {step}/"))) != counted
        if step > 1:
            assert (weights[step - 1] == weights[step - 2]) != counted, step
    assert steps[40]["train/skipped_updates"] == 0
    (events,) = (run_folder / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == sum(counts)


@pytest.mark.parametrize("processes", (1, 2))
def test_batches_in_which_nothing_counts_change_nothing(setup, processes):
    """Of two processes one may have a target and the other none: then there is an update of both."""
    check_that_batches_in_which_nothing_counts_change_nothing(*setup, processes)


def test_evaluation_judges_answers_in_their_bytes(setup, tmp_path):
    config, run_folder = setup
    assert train(config).returncode == 0
    model = libxlstm.load(run_folder, device="cpu")
    pairs = [("2+2=", "4"), ("a long question that is not judged?", "yes"), ("", "all")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    nats = num_targets = num_bytes = 0
    with torch.no_grad():
        for question, answer in pairs:
            ids = torch.tensor([list((question + answer + "\0").encode())])
            first = max(len(question), 1)  # a document's first token is not predicted
            logits = model(ids[:, :-1])[0].log_softmax(-1)[0]
            nats -= logits[first - 1:].gather(1, ids[0, first:, None]).sum().item()
            num_targets += ids.shape[1] - first
            num_bytes += ids.shape[1] - 1 - first
    command = [XLSTM_DATA.parent / "xlstm-eval", run_folder, "--json", tmp_path / "e.json", "--seq-len"]
    for length in ("100", "3"):  # the shorter one begins windows within answers: another loss, the same tokens
        for more in ([], ["--frequency-buckets", "1000"]):
            done = subprocess.run([*command, length, "--text", tmp_path / "own.jsonl", *more], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            result = json.loads((tmp_path / "e.json").read_text())
            assert result["tokens"] == num_targets
            assert result["bits_per_byte"] == pytest.approx(result["loss"] * num_targets / math.log(2) / num_bytes, rel=1e-6)
            if length == "100":
                assert result["loss"] == pytest.approx(nats / num_targets, rel=1e-4)
            if more:
                assert sum(bucket["tokens"] for bucket in result["frequency"].values()) == num_targets
    (tmp_path / "plain.txt").write_text("a plain text has no prompt")
    done = subprocess.run([*command, "100", "--text", tmp_path / "plain.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["tokens"] == len("a plain text has no prompt")


def test_a_mixture_of_prompts_and_plain_text(tmp_path):
    write_pairs(tmp_path / "t.jsonl")
    run("prepare", tmp_path / "t.jsonl", "--output", tmp_path / "qa", "--text-key", "answer", "--prompt-key", "question")
    (tmp_path / "p.txt").write_text("plain text, all of which counts. " * 100)
    run("prepare", tmp_path / "p.txt", "--output", tmp_path / "plain")
    data = libxlstm.TokenData([tmp_path / "qa", tmp_path / "plain"], 16)
    ids, targets, _ = data.batch(0, 40)
    plain = (ids == ord(" ")).any(1)
    assert plain.sum() == 20
    counted = (targets != -100).sum(1)
    assert counted[plain].min() >= 15 and counted[~plain].max() < 16

    sources = ", ".join(f"{{path: {tmp_path / name}, weight: {weight}}}" for name, weight in (("qa", 3), ("plain", 1)))
    prompts = libxlstm.TokenData(tmp_path / "qa", 16)
    share = prompts.num_counted_tokens / prompts.num_tokens
    assert share < 0.3 and libxlstm.TokenData(tmp_path / "plain", 16).num_counted_tokens == 3301
    (tmp_path / "c.yaml").write_text("model: {embedding_dim: 16, num_blocks: 1, num_heads: 1}\n"
                                     f"data: {{train: [{sources}]}}\ntrain: {{max_steps: 1000}}\n")
    done = subprocess.run([PROGRAM, "--describe", tmp_path / "c.yaml"], capture_output=True, text=True)
    numbers = json.loads(done.stdout)
    assert numbers["counted_tokens"] == round(numbers["tokens"] * (3 * share + 1) / 4)
    (tmp_path / "qa.bin").unlink()
    done = subprocess.run([PROGRAM, "--describe", tmp_path / "c.yaml"], capture_output=True, text=True)
    assert json.loads(done.stdout)["counted_tokens"] is None

