"""README.md and the guides that it names: their Python runs as it stands, and the files and options that they name are there."""

import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import libxlstm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import BIN, ROOT, environment  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {name: (ROOT / name).read_text(encoding="utf-8") for name in sorted(set(re.findall(r"\((\w[\w/]*/README\.md)\)", README)))}
TEXT = "\n".join([README, *GUIDES.values()])
PROGRAMS = {name: [BIN / name] for name in ("xlstm-train", "xlstm-generate", "xlstm-eval", "xlstm-data", "xlstm-bench")} | {
    "python -m libxlstm.convert": [sys.executable, "-m", "libxlstm.convert"],
    "python -m libxlstm.plot": [sys.executable, "-m", "libxlstm.plot"],
    "python scripts/reproduce.py": [sys.executable, ROOT / "scripts" / "reproduce.py"],
    "python scripts/train_tokenizer.py": [sys.executable, ROOT / "scripts" / "train_tokenizer.py"],
}


def commands():
    """Every command: the lines of plain blocks and what stands in backticks within the text."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`]+)`", prose)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    libxlstm.make_model("model: {embedding_dim: 32, num_blocks: 2, num_heads: 2}").save("runs/quickstart")
    (tmp_path / "corpus.txt").write_text("words of a corpus\n" * 100)
    prepare = [BIN / "xlstm-data", "prepare", "corpus.txt", "--output", "data/corpus"]
    assert subprocess.run(prepare, capture_output=True, env=environment()).returncode == 0
    names = {}
    operators, model = blocks(README, "python")
    exec(operators, names)
    assert names["h"].shape == (2, 100, 4, 128) and names["c"].shape == (2, 4, 64, 128)
    exec(model, names)
    assert names["ids"].shape == (1, 1) and names["logits"].shape == (1, 1, 256)
    names = {}
    hidden, data, stack, states, *_ = blocks(GUIDES["libxlstm/README.md"], "python")
    exec(hidden, names)
    assert names["y"].shape == names["first"].shape == names["last"].shape == (4, 65, 32)
    exec(data, names)
    assert names["ids"].shape == names["targets"].shape == names["reset"].shape == (4, 64)
    exec(stack, names)
    assert names["y"].shape == (2, 100, 64) and not names["y"][1, 40:].any()
    exec(states, names)
    assert names["logits"].shape == (2, 2, 256) and names["first"][0][1].shape[0] == 1
    before, after = libxlstm.load("runs/quickstart"), libxlstm.load("runs/finetuned")
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True) if b.dim() > 1)


def test_its_training_by_transformers_runs(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    monkeypatch.chdir(tmp_path)
    *_, trainer, _ = blocks(GUIDES["libxlstm/README.md"], "python")
    names = {}
    exec(trainer, names)
    assert (tmp_path / "runs" / "trainer" / "checkpoint-20" / "model.safetensors").exists()
    log = names["trainer"].evaluate()
    ids = names["tokens"][:8]
    assert abs(names["model"](ids[:, :-1], targets=ids[:, 1:])[0].item() - log["eval_loss"]) < 1e-3


def test_its_line_for_transformers_runs(tmp_path, monkeypatch):
    from test_accelerate import make_transformers, stand_ins

    make_transformers().save_pretrained(tmp_path / "xLSTM-7b")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks(GUIDES["libxlstm/README.md"], "python")[-1], names)
    assert stand_ins(names["model"])


def test_its_metrics_reach_wandb(tmp_path, monkeypatch):
    """With a stand-in for the package; a run of which some lines come late, one of them in halves."""
    (folder := tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {max_steps: 4}\n")
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"event":"start","step":0}\n{"step":2,"time":1.5,"train/loss":3.0,"train/loss_hex":"0x1"}\n{"step":4,')
    late = ['"train/loss":2.5}\n', '{"step":4,"val/loss":2.0,"val/ppl":null,"val/set":"a"}\n{"event":"end","step":4}\n']

    def write_more(_):
        with metrics.open("a") as file:
            file.write(late.pop(0))

    told = []
    run = types.SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished"))
    stand_in = types.SimpleNamespace(init=lambda **options: told.append(options["config"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(time, "sleep", write_more)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(GUIDES["train/README.md"], "python")
    exec(block, {})
    assert told == [{"train": {"max_steps": 4}}, (2, {"train/loss": 3.0}), (4, {"train/loss": 2.5}), (4, {"val/loss": 2.0}),
                    "finished"]


def test_its_files_exist():
    named = set(re.findall(r"\b(?:configs|scripts|csrc|cuda|libxlstm|tests|train)/[\w./-]+\w", TEXT))
    assert len(named) > 20
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.fixture(scope="module")
def offered():
    """Program -> its options."""
    options = {}
    for name, command in PROGRAMS.items():
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        options[name] = set(re.findall(r"--[a-z-]+", done.stdout))
    return options


def test_its_options_exist(offered):
    for name, options in offered.items():
        lines = [line for line in commands() if line.split("#")[0].startswith(name + " ")]
        assert lines, name
        named = {option for line in lines for option in re.findall(r" (--[a-z-]+)", line.split("#")[0])}
        assert named <= options, name
    alone = {command.split()[0] for command in commands() if command.startswith("--")}
    assert len(alone) > 8
    assert alone <= set.union(*offered.values())


def test_its_sweep_is_one(tmp_path):
    (block,) = blocks(GUIDES["scripts/reproduce/README.md"], "yaml")
    folder = tmp_path / "experiments" / "heads"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(block)
    (tmp_path / "my.txt").write_text("some text of one's own\n" * 100)
    done = subprocess.run([*PROGRAMS["python scripts/reproduce.py"], "heads", "--experiments", "experiments", "--dry-run"],
                          cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "four" in done.stdout and "eight" in done.stdout


def test_its_fine_tuning_begins(tmp_path):
    """With a small model in the place of the published one."""
    (block,) = blocks(GUIDES["train/README.md"], "yaml")
    (tmp_path / "tune.yaml").write_text(block)
    (tmp_path / "chat.jsonl").write_text('{"text": [{"text": "User: hi\\n", "loss": false}, {"text": "Hello!\\n"}]}\n' * 2000)
    model = libxlstm.make_model({"model": {"kind": "xlstm_large", "embedding_dim": 128, "num_blocks": 2, "num_heads": 2}})
    model.save(tmp_path / "runs" / "xlstm-7b")
    done = subprocess.run([BIN / "xlstm-train", "tune.yaml", "--dry-run"], cwd=tmp_path, capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0, done.stderr
    assert "all tensors fit" in done.stdout and "one step " in done.stdout


def test_the_table_names_all_operators():
    rows = re.search(r"\n\| operator \|.*?\n\n", TEXT, re.DOTALL).group(0).splitlines()
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")}
    documented = {name for name in dir(torch.ops.xlstm) if getattr(getattr(torch.ops.xlstm, name), "__signature__", None)}
    assert named == documented
