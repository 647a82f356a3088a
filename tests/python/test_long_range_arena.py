"""The description of the Long Range Arena, its tasks on small files as other programs write them, conversion of Pathfinder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "reproduce"
TRAINER = ROOT / "build" / "bin" / "xlstm-train"
CONVERT = ROOT / "scripts" / "convert_pathfinder.py"
sys.path.insert(0, str(ROOT / "scripts"))

from sweep import description  # noqa: E402
from sweep.execution import fingerprint  # noqa: E402
from sweep.results import SETTINGS_LETTERS, Results, Row  # noqa: E402

needs_trainer = pytest.mark.skipif(not TRAINER.exists(), reason="build/bin/xlstm-train is not built")
#           blocks, width, batch, steps, tokens
PAPER = {"retrieval": (6, 128, 64, 100_000, 8001), "listops": (8, 128, 32, 80_000, 2000),
         "pathfinder": (6, 192, 64, 500_000, 1024), "g_image": (6, 512, 64, 180_000, 1024),
         "rgb_image": (6, 512, 64, 180_000, 1024)}
RESTARTS = "_restarts"
RANDOM = np.random.RandomState(3)


def load(mini=False):
    return description.load(EXPERIMENTS, "lra", mini)


def write_cifar(folder, images=4):
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = RANDOM.randint(0, 256, (images, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())


def write_pairs(folder, lines=6):
    folder.mkdir(parents=True)
    for part in ("train", "eval", "test"):
        texts = ("".join(chr(c) for c in RANDOM.randint(32, 127, 5000)) for _ in range(2 * lines))
        rows = (f"{i % 2}.0\tP{i}\tQ{i}\t{next(texts)}\t{next(texts)}\n" for i in range(lines))
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(rows))


def write_pathfinder(folder, images=6, save=np.savez):
    folder.mkdir(parents=True)
    for part in ("train", "validation", "test"):
        pixels = RANDOM.randint(0, 256, (images, 32, 32), dtype=np.uint8)
        save(folder / f"{part}.npz", images=pixels, labels=np.arange(images) % 2)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the data sets in the places that the description names."""
    write_cifar(tmp_path / "data" / "cifar-10-batches-bin")
    write_pairs(tmp_path / "data" / "lra" / "tsv_data")
    write_pathfinder(tmp_path / "data" / "lra" / "pathfinder32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder, settings, *arguments):
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return subprocess.run([TRAINER, "config.yaml", *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def test_sizes_batches_and_steps_are_the_papers():
    full = load()
    assert set(full.cases) == set(PAPER) and full.learning_rates == [1e-3, 6e-4, 1e-4]
    for case, expected in PAPER.items():
        for model in full.models_of(case):
            settings = full.settings(description.Job(case, model, 1e-3, 0))
            train = settings["train"]
            assert (settings["model"]["num_blocks"], settings["model"]["embedding_dim"], train["global_batch_size"],
                    train["max_steps"], settings["data"]["seq_len"]) == expected
            assert settings["optim"]["warmup_steps"] == train["max_steps"] / 10
            slstm = settings["model"].get("slstm_at", [])
            assert slstm == ([0, 1, 2, 3, 4, 5] if model.startswith("xlstm") and case.endswith("image") else [])


def test_every_model_is_trained_by_both_schedules_of_the_paper():
    full = load()
    assert {model for model in full.models if not model.endswith(RESTARTS)} == {
        model.removesuffix(RESTARTS) for model in full.models if model.endswith(RESTARTS)}
    for case in full.cases:
        for model in full.models_of(case):
            settings = full.settings(description.Job(case, model, 1e-3, 0))
            restarts = settings["optim"].pop("restarts", 0)
            assert settings["optim"]["schedule"] == "cosine" and restarts == (3 if model.endswith(RESTARTS) else 0)
            assert settings == full.settings(description.Job(case, model.removesuffix(RESTARTS), 1e-3, 0))


def test_learning_rates_are_chosen_apart_from_the_test():
    full, mini = load(), load(mini=True)
    assert (full.measure, full.chosen_by, full.evaluations) == ("test.accuracy", "accuracy", {"test": {"held_out": "test"}})
    assert {full.settings(job)["data"]["task"]["held_out"] for job in full.jobs(elsewhere=True)} == {"validation"}
    assert (mini.measure, mini.chosen_by, mini.evaluations) == ("accuracy", "accuracy", {})
    assert not any("held_out" in mini.settings(job)["data"]["task"] for job in mini.jobs())


def test_rows_without_their_files_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = load()
    assert {job.case for job in full.jobs()} == {"listops"}
    assert "lra_release.gz" in full.needs_of("retrieval", "xlstm") and "CIFAR-10" in full.needs_of("g_image", "llama")
    assert "scripts/convert_pathfinder.py" in full.needs_of("pathfinder", "mamba")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "reproduce.py", "lra", "--collect", "--out", tmp_path / "out"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| xLSTM |  |  | 0.906 | not run: needs the ACL Anthology pairs" in done.stdout
    assert "| xLSTM |  |  | 0.411 | not run: 3 of 3 runs are unfinished |" in done.stdout
    (tmp_path / "data" / "cifar-10-batches-bin").mkdir(parents=True)
    assert {job.case for job in full.jobs()} == {"listops", "g_image", "rgb_image"}


def test_results_are_not_stale_where_the_files_are_not(files, monkeypatch):
    full = load()
    job = next(job for job in full.jobs() if job.case == "g_image")
    rows = [Row(job, "done", settings=fingerprint(full, job)[:SETTINGS_LETTERS]), Row(job, "done", settings="other")]
    monkeypatch.chdir(files / "data")
    assert job not in full.jobs() and Results(full, rows, None).stale() == rows[1:]


@needs_trainer
@pytest.mark.parametrize("case", PAPER)
def test_the_trainer_takes_every_case_at_full_size(files, case):
    """A step of one block at the full width and length, on the case's files; the schedule has no part in it."""
    full = load()
    assert {job.case for job in full.jobs()} == set(PAPER)
    for model in full.models_of(case):
        if model.endswith(RESTARTS):
            continue
        settings = full.settings(description.Job(case, model, 1e-3, 0))
        small = ["train.global_batch_size=1", "train.micro_batch_size=0", "train.dtype=float32", "train.max_steps=30",
                 "optim.warmup_steps=1", "model.num_blocks=1", "model.slstm_at=[]"]
        done = train(files, settings, "--dry-run", *small)
        assert done.returncode == 0, f"{model}: {done.stderr}"
        assert f"task {settings['data']['task']['name']}" in done.stdout, f"{model}\n{done.stdout}"


@needs_trainer
def test_a_missing_folder_is_told_before_training(tmp_path):
    settings = load().settings(description.Job("g_image", "xlstm", 1e-3, 0))
    done = train(tmp_path, settings, "--dry-run", "train.global_batch_size=1", "train.dtype=float32")
    assert done.returncode == 0
    assert "data/cifar-10-batches-bin, the folder of data.task image, is not there: not checked" in done.stdout
    done = train(tmp_path, settings)
    assert done.returncode == 3 and "data_batch_1.bin: no such file; data.task.path must be" in done.stderr


def classifier(name, path, vocab, length, steps, **model):
    return {"model": {"vocab_size": vocab, "embedding_dim": 16, "num_blocks": 1, "num_heads": 2, "slstm_at": [0], **model},
            "data": {"seq_len": length, "task": {"name": name, "path": str(path)}},
            "train": {"global_batch_size": 4, "max_steps": steps}, "optim": {"warmup_steps": 1, "learning_rate": 2e-2},
            "log": {"console": "plain", "tensorboard": False, "plot": False}, "ckpt": {"every": 0}, "eval": {"every": 0}}


@needs_trainer
def test_colours_are_learnt_as_vectors(tmp_path):
    """Red images of class 3, green ones of class 7: the answer is a token, the inputs are real."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = RANDOM.randint(0, 60, (8, 3073), dtype=np.uint8)
        records[:4, 0], records[:4, 1:1025] = 3, 255
        records[4:, 0], records[4:, 1025:2049] = 7, 255
        (folder / name).write_bytes(records.tobytes())
    done = train(tmp_path, classifier("rgb_image", folder, 10, 1024, 25, input_features=3))
    assert done.returncode == 0, done.stderr
    done = subprocess.run([TRAINER.parent / "xlstm-eval", "--json", "eval.json", "runs/run"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = yaml.safe_load((tmp_path / "eval.json").read_text())
    assert measured["accuracy"] == 1.0 and "last_error" not in measured
    done = subprocess.run([TRAINER.parent / "xlstm-eval", "--min-len", "5", "runs/run"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 2 and "--min-len is for a data.task whose samples are drawn" in done.stderr


@needs_trainer
def test_a_run_that_holds_out_a_part_to_choose_by_is_judged_by_the_test_too(tmp_path):
    write_cifar(tmp_path / "cifar")
    settings = classifier("image", "cifar", 256, 1024, 2)
    settings["data"]["task"]["held_out"] = "validation"
    done = train(tmp_path, settings, "--dry-run")
    assert "task image, 18 windows" in done.stdout and "held out 2 samples" in done.stdout, done.stderr + done.stdout
    done = train(tmp_path, settings)
    assert done.returncode == 0, done.stderr

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()  # data.task.path begins where the run was started

    def judged(*arguments):
        return subprocess.run([TRAINER.parent / "xlstm-eval", "--json", tmp_path / "eval.json", *arguments, tmp_path / "runs/run"],
                              cwd=elsewhere, capture_output=True, text=True, timeout=300)

    for arguments, samples, data in (((), 2, "data.task image, validation"), (("--held-out", "test"), 4, "data.task image")):
        done = judged(*arguments)
        assert done.returncode == 0, done.stderr
        told = yaml.safe_load((tmp_path / "eval.json").read_text())
        assert (told["tokens"], told["data"]) == (samples, data)
    done = judged("--held-out", "all")
    assert done.returncode == 2 and "--held-out is all, expected test or validation" in done.stderr


@needs_trainer
def test_archives_of_numpy_are_read(tmp_path):
    write_pathfinder(tmp_path / "plain")
    write_pathfinder(tmp_path / "packed", save=np.savez_compressed)
    done = train(tmp_path, classifier("pathfinder", "plain", 256, 1024, 2), "--dry-run")
    assert done.returncode == 0 and "task pathfinder, 6 windows" in done.stdout, done.stderr + done.stdout
    done = train(tmp_path, classifier("pathfinder", "packed", 256, 1024, 2))
    assert done.returncode == 3 and "packed/train.npz: images.npy is compressed" in done.stderr


def write_png_release(folder, image_module):
    """As in lra_release: metadata in text files called .npy, one image of them empty."""
    level = folder / "curv_contour_length_14"
    (level / "metadata").mkdir(parents=True)
    labels = {}
    for number in (0, 1):
        where = level / "imgs" / str(number)
        where.mkdir(parents=True)
        lines = []
        for i in range(11):
            value = 11 * number + i
            labels[value] = value % 2
            image_module.fromarray(np.full((4, 4), value, np.uint8)).save(where / f"sample_{i}.png")
            lines.append(f"imgs/{number} sample_{i}.png 0 {value % 2} 1 2 3\n")
        (level / "metadata" / f"{number}.npy").write_text("".join(lines))
    (level / "imgs" / "0" / "sample_0.png").write_bytes(b"")
    (level / "imgs" / "1" / "sample_0.png").write_bytes(b"")
    del labels[0], labels[11]
    return labels


def convert(folder):
    return subprocess.run([sys.executable, CONVERT, folder / "pathfinder32", folder / "out"], capture_output=True, text=True,
                          timeout=120)


def test_conversion_of_pathfinder(tmp_path):
    labels = write_png_release(tmp_path / "pathfinder32", pytest.importorskip("PIL.Image"))
    done = convert(tmp_path)
    assert done.returncode == 0, done.stderr
    seen = {}
    sizes = []
    for part in ("train", "validation", "test"):
        images, marks = (np.load(tmp_path / "out" / f"{part}_{name}.npy") for name in ("images", "labels"))
        assert images.dtype == np.uint8 and images.shape[1:] == (4, 4)
        sizes.append(len(marks))
        for image, label in zip(images, marks):
            assert (image == image[0, 0]).all()
            seen[int(image[0, 0])] = int(label)
    assert seen == labels and sizes == [16, 2, 2]
    if TRAINER.exists():
        done = train(tmp_path, classifier("pathfinder", "out", 256, 16, 2), "--dry-run")
        assert done.returncode == 0 and "task pathfinder, 16 windows" in done.stdout, done.stderr + done.stdout
    (tmp_path / "out" / "test.npz").touch()
    done = convert(tmp_path)
    assert done.returncode == 1 and "test.npz: would be read instead of what is written now; remove it" in done.stderr


def test_conversion_names_what_is_wrong(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    write_png_release(tmp_path / "pathfinder32", image_module)
    level = tmp_path / "pathfinder32" / "curv_contour_length_14"

    def refused(path, content, expected):
        before = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        done = convert(tmp_path)
        path.write_bytes(before)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"{path}: {expected}"), done.stderr

    metadata, image = level / "metadata" / "1.npy", level / "imgs" / "1" / "sample_4.png"
    lines = metadata.read_bytes()
    refused(metadata, lines + b"\n", "line 12 has 0 columns, expected folder, name, number and label")
    refused(metadata, b"imgs/1 sample_4.png\n" + lines, "line 1 has 2 columns")
    refused(metadata, lines.replace(b"0 1 1 2 3", b"0 2 1 2 3", 1), "label 2 of sample_")
    refused(image, None, "no such file, but ")
    for end in (10, 50):
        refused(image, image.read_bytes()[:end], "not a whole image (")
    image_module.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "other.png")
    refused(image, (tmp_path / "other.png").read_bytes(), "4 x 5 pixels, but ")
    assert not (tmp_path / "out").exists() and convert(tmp_path).returncode == 0


def test_the_miniature_is_listops_alone_and_asserts_nothing():
    mini = load(mini=True)
    assert {job.case for job in mini.jobs()} == {"listops"}
    assert set(mini.models) == {model for model in load().models if not model.endswith(RESTARTS)}
    settings = mini.settings(mini.jobs()[0])
    assert settings["data"]["seq_len"] == 64 and settings["data"]["task"]["max_depth"] == 3
    assert (settings["model"]["embedding_dim"], settings["model"]["num_blocks"]) == (64, 2)
    assert not any(claim.get("asserted") for claim in mini.claims)
