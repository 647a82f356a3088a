"""libxlstm.lm_eval in lm-evaluation-harness itself, where that is installed: tasks from local files, nothing is downloaded;
the adapter also over a stand-in for what it uses of the harness."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libxlstm
import lm_eval_stand_in
from libxlstm.scoring import Judge, rolling_windows

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "libxlstm.lm_eval"
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
YAML = """
model: {vocab_size: 256, embedding_dim: 32, num_blocks: 2, num_heads: 2, slstm_at: [1]}
data: {seq_len: 48}
"""
CHOICES = ["the gate", "the cell and the state", "a word"]
NAMES = ["memory", "state", "cell", "input and the output of a block", "sum"]
QUESTIONS = [{"question": f"What keeps the {name}?", "choices": CHOICES, "answer": i % 3} for i, name in enumerate(NAMES)]
TEXTS = [{"text": "The gate reads the cell " * n + "and writes"} for n in (1, 2, 5)]
TASKS = {
    "tiny_choices": ("questions", """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""),
    "tiny_last_word": ("texts", """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]
"""),
    "tiny_rolling": ("texts", """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""),
    "tiny_generation": ("questions", """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 7, do_sample: false}
metric_list: [{metric: exact_match}]
"""),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    model = libxlstm.make_model(YAML)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    parameters["lm_head.weight"].mul_(10)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    libxlstm._C.save_model_folder(str(folder), YAML, parameters)
    return folder


def stand_in(monkeypatch):
    """The adapter over the stand-in, until the test ends."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in lm_eval_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, ADAPTER, None)  # so that what stands there now is put back
    del sys.modules[ADAPTER]
    return importlib.import_module(ADAPTER)


@pytest.fixture(params=["stand-in", pytest.param("lm_eval", marks=needs_harness)])
def adapter(request, monkeypatch):
    return stand_in(monkeypatch) if request.param == "stand-in" else importlib.import_module(ADAPTER)


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, documents in (("questions", QUESTIONS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, (documents, text) in TASKS.items():
        data = json.dumps({"data_files": {"test": str(folder / f"{documents}.jsonl")}})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def harness(tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "libxlstm.lm_eval", *map(str, arguments)], capture_output=True, text=True,
                          env=environment, cwd=tmp_path)


@needs_harness
def test_the_harness_runs_tasks_of_every_kind(checkpoint, tasks, tmp_path):
    done = harness(tmp_path, "--tasks", ",".join(TASKS), "--include_path", tasks, "--batch_size", 2, "--log_samples",
                   "--model_args", f"pretrained={checkpoint},device=cpu,dtype=float32", "--output_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    samples = {name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")).open()]
               for name in TASKS}
    samples = {name: sorted(lines, key=lambda line: line["doc_id"]) for name, lines in samples.items()}
    judge = Judge.load(checkpoint, device="cpu", batch_size=1)
    encode = judge.tokenizer.encode

    def score(context, continuation):
        return judge.score([(encode(context), encode(continuation))])[0]

    right, right_by_length = 0, 0
    for question, sample in zip(QUESTIONS, samples["tiny_choices"]):
        expected = [score(question["question"], " " + choice)[0] for choice in question["choices"]]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, rel=1e-5, abs=1e-4)
        right += expected.index(max(expected)) == question["answer"]
        by_length = [total / len(choice) for total, choice in zip(expected, question["choices"])]
        right_by_length += by_length.index(max(by_length)) == question["answer"]
    assert results["tiny_choices"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert results["tiny_choices"]["acc_norm,none"] == pytest.approx(right_by_length / len(QUESTIONS))

    last = [score(text["text"].rsplit(" ", 1)[0], " writes")[0] for text in TEXTS]
    assert results["tiny_last_word"]["perplexity,none"] == pytest.approx(math.exp(-sum(last) / 3), rel=1e-4)
    total = sum(judge.score_rolling([encode(text["text"]) for text in TEXTS]))
    num_bytes = sum(len(text["text"]) for text in TEXTS)
    assert results["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-4)
    generated = judge.generate([encode(question["question"]) for question in QUESTIONS], ["\n"], 7)
    assert [sample["resps"][0][0] for sample in samples["tiny_generation"]] == generated and any(generated)


@needs_harness
def test_an_error_is_one_line_and_a_status(tasks, tmp_path):
    done = harness(tmp_path, "--tasks", "tiny_choices", "--include_path", tasks,
                   "--model_args", "pretrained=nowhere,device=cpu")
    assert done.returncode == 4 and done.stderr.strip().splitlines()[-1].startswith("error: nowhere: no such folder")


@pytest.mark.parametrize("name", [[], ["--model", "xlstm"], ["-M", "xlstm"]])
def test_the_command_names_the_model(checkpoint, monkeypatch, capsys, name):
    main = stand_in(monkeypatch).main
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--tasks", "piqa", "-b", "3", "-a", f"pretrained={checkpoint},device=cpu",
                                      *name])
    assert main() == 0 and capsys.readouterr().out == "xlstm for piqa, 3 side by side\n"
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--tasks", "piqa", "--model_args", "pretrained=nowhere,device=cpu", *name])
    assert main() == 4 and capsys.readouterr().err.startswith("error: nowhere: no such folder")


def test_the_model_by_its_name_in_python(checkpoint, adapter):
    Instance = importlib.import_module("lm_eval.api.instance").Instance
    XlstmLM = adapter.XlstmLM
    assert importlib.import_module("lm_eval.api.registry").get_model("xlstm") is XlstmLM
    given = {"batch_size": "auto", "max_batch_size": 64, "device": "nowhere"}  # --model_args stand above the options
    lm = XlstmLM.create_from_arg_string(f"pretrained={checkpoint},device=cpu,max_length=20", given)
    assert lm.batch_size == 16 and lm.max_length == 20 and str(lm.device) == "cpu" and lm.eot_token_id == 0
    cached = []
    lm.cache_hook.add_partial = lambda *call: cached.append(call)

    def requests(kind, *arguments):
        return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]

    # Without a context a text follows what one starts with; spaces at a context's end belong to the continuation, so that a
    # context of nothing else is none.
    pairs = [("", "word"), ("the  ", "cell"), ("the", "  cell"), (" \n", "word"), ("", " \nword")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert found[0] == pytest.approx(lm.judge.score([([10], list(b"word"))])[0]) and found[1] == pytest.approx(found[2])
    assert found[3] == pytest.approx(found[4])
    assert sorted(cached) == sorted(("loglikelihood", pair, result) for pair, result in zip(pairs, found))
    text = "a text that is longer than the window of twenty bytes"
    total, = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert total == pytest.approx(sum(r[0] for r in lm.judge.score(rolling_windows(list(text.encode()), 10, 20))))
    texts = lm.generate_until(requests("generate_until", ("the", {"max_gen_toks": 4}), ("", {"max_gen_toks": 2}),
                                       ("a cell", {"max_gen_toks": 4})), disable_tqdm=True)
    alone = [lm.judge.generate([ids], (), count)[0] for ids, count in ((list(b"the"), 4), ([10], 2), (list(b"a cell"), 4))]
    assert texts == alone
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="no GPU"):
            assert str(XlstmLM.create_from_arg_obj({"pretrained": str(checkpoint)}, {"device": "cuda:0"}).device) == "cpu"
    assert ("generate_until", ("", {"max_gen_toks": 2}), texts[1]) in cached


def test_contexts_follow_the_token_that_imported_weights_want(checkpoint, adapter):
    Instance = importlib.import_module("lm_eval.api.instance").Instance
    lm = adapter.XlstmLM(str(checkpoint), device="cpu")
    lm.judge.tokenizer.bos_id = 7

    def ask(kind, *arguments):
        return getattr(lm, kind)([Instance(kind, {}, each, i) for i, each in enumerate(arguments)], disable_tqdm=True)

    judge, length = lm.judge, {"max_gen_toks": 3}

    def score(*pairs):
        return [total for total, _ in judge.score([(list(context), list(text)) for context, text in pairs])]

    found = ask("loglikelihood", ("the", " cell"), ("", "word"), ("\7", "cell"))  # the last context begins with it
    expected = score((b"\7the", b" cell"), (b"\7", b"word"), (b"\7", b"cell"))
    assert [total for total, _ in found] == pytest.approx(expected)
    assert score((b"the", b" cell")) != pytest.approx(expected[:1])
    assert ask("loglikelihood_rolling", ("a text",)) == pytest.approx(score((b"\7", b"a text")))
    assert ask("generate_until", ("the", length), ("", length)) == judge.generate([[7, *b"the"], [7]], (), 3)


@needs_harness
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 29])
def test_windows_are_those_of_the_harness(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(1, length + 1))
    theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 0, 8, 1))
    assert rolling_windows(ids, 0, 8) == list(theirs)


def test_the_command_without_the_harness_says_what_to_install():
    code = f"import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('{ADAPTER}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: lm-evaluation-harness is not there") and "pip install" in done.stderr
    assert "Traceback" not in done.stderr
