"""Bad input: one line that says what, where and how to fix it, and the documented exit status."""

import hashlib
import json
import os
import re
import shutil
import subprocess

import pytest
from tiny_run import BIN, TinyRun, environment, program


@pytest.fixture
def run(tmp_path, shared):
    return TinyRun(tmp_path, shared, steps=2)


@pytest.fixture
def prefix(tmp_path, run, shared):
    program("xlstm-data", "prepare", "--output", tmp_path / "tokens", shared / "text.txt", check=0)
    return tmp_path / "tokens"


def on_tokens(prefix):
    return ["data.text=", f"data.train=[{{path: {prefix}}}]", f"data.val={prefix}"]


def refused(done, code, *parts):
    assert done.returncode == code, f"exit {done.returncode}, expected {code}: {done.stdout}\n{done.stderr}"
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0] == done.stderr.splitlines()[-1], done.stderr
    for part in parts:
        assert str(part) in errors[0], f"{part!r} is not in: {errors[0]}"


@pytest.mark.parametrize("line, parts", [
    ("trian: {max_steps: 5}", ["trian", "train"]),
    ("train: {max_stepz: 5}", ["max_stepz", "max_steps"]),
    ("optim: {learning_rate: fast}", ["optim.learning_rate", "fast"]),
    ("optim: {learning_rate: -1}", ["optim.learning_rate", "-1"]),
    ("train: {max_steps: 1.5}", ["train.max_steps", "1.5"]),
    ("train: [1, 2]", ["train"]),
    ("run: {seed: yes}", ["run.seed"]),
])
def test_bad_settings_name_file_line_and_key(run, line, parts):
    section = line.split(":")[0]
    kept = [old for old in run.config.read_text().splitlines() if not old.startswith(section + ":")]
    run.config.write_text("\n".join([*kept, line]) + "\n")
    refused(run.train(), 2, f"{run.config}:{len(kept) + 1}", *parts)
    assert not run.path.exists()


def test_duplicate_key(run):
    text = run.config.read_text()
    run.config.write_text(text + "optim: {learning_rate: 1e-3}\n")
    refused(run.train(), 2, run.config, "optim")


def test_bad_override_and_option(run):
    refused(run.train("train.max_stepz=5"), 2, "max_stepz", "max_steps")
    refused(run.train("train.max_steps=many"), 2, "train.max_steps", "many")
    refused(run.train("--dryrun"), 2, "--dryrun", "--dry-run")
    refused(program("xlstm-train", run.folder / "absent.yaml"), 2, "absent.yaml")


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-04"])
def test_3e_4_is_a_number(run, text):
    config = run.config.read_text().replace("learning_rate: 1e-2", f"learning_rate: {text}")
    run.config.write_text(config.replace("min_lr: 1e-3", "min_lr: 1e-5"))
    for arguments in [[], [f"optim.learning_rate={text}"]]:
        printed = run.train("--print-config", *arguments, check=0).stdout
        value = re.search(r"learning_rate: *([^ \n]+)", printed).group(1)
        assert float(value) == 3e-4


def test_token_beyond_the_vocabulary(run, prefix):
    arguments = [*on_tokens(prefix), "model.vocab_size=100"]
    refused(run.train(*arguments), 2, prefix, "model.vocab_size 100", "model.vocab_size=256")  # the sidecar tells
    prefix.with_suffix(".meta.json").unlink()
    refused(run.train(*arguments), 3, prefix, "100")  # the tokens tell


def test_tokenizers_are_judged_before_the_first_step(run, prefix, tmp_path):
    sidecar = prefix.with_suffix(".meta.json")
    words, absent = tmp_path / "words.json", tmp_path / "absent.json"
    words.write_text("{}")

    def refused_for(tokenizer, *parts):
        done = run.train(*on_tokens(prefix), f"data.tokenizer={tokenizer}")
        refused(done, 3, *parts)
        assert "step 1/" not in done.stdout + done.stderr and not run.checkpoints()

    refused_for(words, prefix, "made with the tokenizer bytes", words)
    about = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(about | {"tokenizer": "other.json", "tokenizer_sha256": "0" * 64}))
    refused_for(words, prefix, "made with the tokenizer other.json", words)
    hashed = hashlib.sha256(hashlib.sha256(b"{}").hexdigest().encode()).hexdigest()
    sidecar.write_text(json.dumps(about | {"tokenizer": "other.json", "tokenizer_sha256": hashed}))
    run.train(*on_tokens(prefix), f"data.tokenizer={words}", "sample.prompts=[]", "--dry-run", check=0)
    done = run.train(*on_tokens(prefix), f"data.tokenizer={words}", "--dry-run")
    assert done.returncode == 3 and "not a tokenizer" in done.stderr  # prompts would need it
    sidecar.unlink()
    refused_for(absent, absent, "no such tokenizer")


def test_truncated_bin(run, prefix):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(run.train(*on_tokens(prefix)), 3, path)


def test_truncated_idx(run, prefix):
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:-5])
    refused(run.train(*on_tokens(prefix)), 3, path)


def test_bin_and_idx_of_different_sets(run, prefix, tmp_path):
    (tmp_path / "other.txt").write_text("another text\n" * 100)
    program("xlstm-data", "prepare", "--output", tmp_path / "other", tmp_path / "other.txt", check=0)
    shutil.copy(tmp_path / "other.idx", prefix.with_suffix(".idx"))
    refused(run.train(*on_tokens(prefix)), 3, prefix)


def test_missing_data(run, tmp_path):
    refused(run.train(*on_tokens(tmp_path / "absent")), 3, tmp_path / "absent")
    refused(run.train(f"data.text={tmp_path / 'absent.txt'}"), 3, "absent.txt")


def test_empty_corpus(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(run.train(f"data.text={empty}"), 3, empty)
    (tmp_path / "folder").mkdir()
    refused(run.train(f"data.text={tmp_path / 'folder'}"), 3, tmp_path / "folder")
    refused(program("xlstm-data", "prepare", "--output", tmp_path / "tokens", empty), 3, empty)


def test_one_window_of_tokens_is_enough_and_one_less_is_not(run, tmp_path):
    def prepared(num_tokens):  # the end-of-document token is one of them
        text = tmp_path / f"{num_tokens}.txt"
        text.write_text("a" * (num_tokens - 1))
        program("xlstm-data", "prepare", "--output", tmp_path / str(num_tokens), text, check=0)
        return tmp_path / str(num_tokens)

    run.train(*on_tokens(prepared(33)), "--fresh", check=0)
    assert run.last_step() == 2
    refused(run.train(*on_tokens(prepared(32)), "--fresh"), 3, tmp_path / "32", "33")


def test_run_folder_that_cannot_be_written_fails_before_step_1(run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run.train(f"run.out_dir={tmp_path / 'file'}"), 4, tmp_path / "file")
    assert "step 1/" not in run.train(f"run.out_dir={tmp_path / 'file'}").stdout
    run.path.write_text("a file where the run folder would be")
    refused(run.train(), 4, run.path)


def test_read_only_run_folder(run, tmp_path):
    """As root, permissions do not bind: a read-only mount in a private name space does."""
    read_only = tmp_path / "ro"
    read_only.mkdir()
    if os.geteuid() != 0:
        read_only.chmod(0o555)
        refused(run.train(f"run.out_dir={read_only}"), 4, read_only)
        return
    script = f'mount --bind "{read_only}" "{read_only}" && mount -o remount,ro,bind "{read_only}" || exit 99; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("no private mounts here")
    done = subprocess.run([*command, BIN / "xlstm-train", run.config, f"run.out_dir={read_only}"], env=environment(),
                          capture_output=True, text=True)
    refused(done, 4, read_only)
    assert not list(read_only.iterdir())


def test_folder_of_something_else_is_left_alone(run):
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("precious")
    refused(run.train(), 4, run.path)
    assert [p.name for p in run.path.iterdir() if p.name != "lock"] == ["thesis.tex"]


def test_resuming_with_another_model_or_other_data_is_refused(run, tmp_path):
    run.train(check=0)
    refused(run.train("model.embedding_dim=64", "train.max_steps=3"), 2, "embedding_dim")
    other = tmp_path / "other.txt"
    other.write_text("other words entirely\n" * 2000)
    done = run.train(f"data.text={other}", "train.max_steps=3")
    assert done.returncode in (2, 3, 4) and done.stderr.splitlines()[-1].startswith("xlstm-train: error:"), done.stderr


@pytest.mark.parametrize("name", ["xlstm-generate", "xlstm-eval"])
def test_programs_on_checkpoints_refuse_bad_arguments(name, run, tmp_path):
    refused(program(name), 2, "--help")
    refused(program(name, tmp_path / "absent"), 4, tmp_path / "absent")
    refused(program(name, tmp_path), 4, tmp_path)
    refused(program(name, run.config), 4, run.config, "a file, expected the folder of a run")
    (tmp_path / "runs" / "mine" / "ckpt").mkdir(parents=True)
    refused(program(name, tmp_path / "runs"), 4, tmp_path / "runs", "a folder of runs; name one of them: mine")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "run.log").touch()
    refused(program(name, tmp_path / "stopped"), 4, "a run that never came to a checkpoint")
    refused(program(name, tmp_path, "--sed", "1"), 2, "--sed")
    refused(program(name, tmp_path, "--threads", "two"), 2, "--threads", "two")


@pytest.mark.parametrize("field, value", [("train.nonfinite", "stop"), ("train.nonfinite", "skip")])
def test_non_finite_gradient(run, field, value):
    done = run.train(f"{field}={value}", "train.max_steps=4", XLSTM_FAILPOINT="trainer.nan_grad:2")
    if value == "stop":
        refused(done, 5)
        assert all(p.name != "step-00000002" for p in run.checkpoints())
    else:
        assert done.returncode == 0, done.stderr
        assert run.metrics()[-1]["step"] == 4
        assert max(m.get("train/skipped_updates", 0) for m in run.metrics()) == 1
