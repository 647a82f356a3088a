"""model.generate: what it draws, what it takes, and beside what it may run."""

import os
import signal
import subprocess
import threading

import pytest
import torch
from test_models import ROOT, make_model

import libxlstm


def test_generate(tmp_path):
    model = make_model()
    prompt = [5, 290, 17]
    with torch.no_grad():
        logits, state = model(torch.tensor([prompt]))
        expected = []
        for _ in range(30):
            expected.append(int(logits[0, -1].argmax()))
            logits, state = model(torch.tensor([[expected[-1]]]), state)
    assert model.generate(prompt, 30, temperature=0) == expected
    assert model.generate(torch.tensor([prompt]), 30, temperature=0) == [expected] and model.training

    told = []
    drawn = model.generate(torch.tensor(prompt), 40, seed=7, on_token=told.append)
    assert drawn == told == model.generate(prompt, 40, seed=7) != model.generate(prompt, 40, seed=8) and len(drawn) == 40
    assert model.generate(prompt, 40, seed=7, stop_token=drawn[5]) == drawn[: drawn.index(drawn[5]) + 1]
    assert max(model.generate(prompt, 200, temperature=5.0, vocab_size=9)) == 8
    assert max(model.generate(prompt, 200, temperature=5.0)) > 8
    assert model.generate(prompt, 40, top_k=1) == model.generate(prompt, 40, temperature=0)
    assert model.generate(prompt, 0) == []

    def interrupt(token):
        told.append(token)
        if len(told) == 45:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run behind a shell it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt, 10**9, on_token=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(told) <= 46
    for wrong, message in (({"prompt": []}, "at least one token"), ({"prompt": [300]}, "300 is outside"),
                           ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p")):
        with pytest.raises(libxlstm.Error, match=message):
            model.generate(**{"prompt": prompt} | wrong)
    for wrong in (torch.zeros(2, 3, 4, dtype=torch.long), [[1.0, 2.0]], [[[1]]], [[True]]):
        with pytest.raises(ValueError, match=r"prompt: expected ids \(T\), or several such"):
            model.generate(wrong)


def test_generate_gives_what_the_program_gives(tmp_path):
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "slstm_at": [1]}})
    model.save(tmp_path / "model")
    done = subprocess.run([ROOT / "build" / "bin" / "xlstm-generate", tmp_path / "model", "--prompt", "ab", "--max-new-tokens",
                           "50", "--device", "cpu", "--seed", "3", "--no-echo"], capture_output=True, check=True)
    ids = model.generate(list(b"ab"), 50, seed=3)
    assert done.stdout.decode() == bytes(ids).decode(errors="replace") + "\n"


def test_where_a_model_has_a_tokenizer_generation_ends_as_its_documents_do(tmp_path):
    settings = {"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "vocab_size": 300}}
    fresh = libxlstm.make_model(settings)
    assert fresh.tokenizer is None
    with torch.no_grad():
        fresh.lm_head.weight.zero_()  # all ids are equally likely
    assert len(fresh.generate([1], 2000, seed=1)) == 2000 and max(fresh.generate([1], 2000, seed=1)) > 255
    fresh.save(tmp_path / "model")
    loaded = libxlstm.load(tmp_path / "model")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("größe")) == "größe" and loaded.tokenizer is loaded.tokenizer
    drawn = loaded.generate([1], 2000, seed=1)
    assert drawn[-1] == 0 and 0 not in drawn[:-1] and max(drawn) < 256
    drawn = loaded.generate([1], 2000, seed=1, stop_token=-1, vocab_size=300)
    assert len(drawn) == 2000 and max(drawn) > 255
    task = libxlstm.make_model(settings | {"data": {"task": {"name": "parity"}}})
    task.save(tmp_path / "task")
    assert libxlstm.load(tmp_path / "task").tokenizer is None


def test_generation_beside_training():
    """Generation drops nothing, and a model that trains goes on dropping, whatever another thread does meanwhile."""
    torch.manual_seed(1)
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "dropout": 0.5}})
    expected = model.generate([1, 2], 60, seed=3)
    ids = torch.randint(256, (1, 40))
    results, losses = {}, []

    def work(name, count):
        results[name] = model.generate([1, 2], count, seed=3)

    threads = [threading.Thread(target=work, args=(i, 60 - 10 * i)) for i in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or len(losses) < 3:
        losses.append(model.loss(ids, ids).item())
    assert all(results[i] == expected[: 60 - 10 * i] for i in range(3))
    assert len(set(losses)) == len(losses) and model.training and model._core.training


def test_arguments_of_generate_and_load(tmp_path):
    model = make_model()
    for name, wrong in (("seed", -1), ("seed", None), ("seed", 2**64), ("max_new_tokens", -1), ("max_new_tokens", 2**63),
                        ("vocab_size", -1), ("stop_token", 1.5), ("stop_token", [1]), ("top_k", 1.5), ("top_k", "a")):
        with pytest.raises(ValueError, match=f"{name}: expected an integer"):
            model.generate([1], **{name: wrong})
    for name, wrong in (("temperature", "a"), ("temperature", None), ("top_p", "0.5"), ("top_p", [])):
        with pytest.raises(ValueError, match=f"{name}: expected a number"):
            model.generate([1], **{name: wrong})
    for prompt in (1, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"prompt: expected ids \(T\), or several such, got torch.int64 of shape \(\)"):
            model.generate(prompt)
    assert model.generate([1], 9, top_k=None, top_p=None) == model.generate([1], 9)
    with torch.device("meta"):
        assert len(model.generate([1, 2], 3)) == 3
    with pytest.raises(ValueError, match="dtype: expected one of torch.float32"):
        libxlstm.load(tmp_path, dtype="bfloat16")
    (tmp_path / "file").write_text("x")
    with pytest.raises(libxlstm.Error) as caught:
        model.save(tmp_path / "file")
    assert caught.value.code == 4


KINDS = ("xlstm", "xlstm_large", "lstm", "mamba", "rwkv4", "rwkv6", "retnet", "gla", "hgrn", "hgrn2", "h3")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_its_state(kind):
    """Turn by turn as from the whole text: the state is behind all that was drawn."""
    torch.manual_seed(1)
    model = libxlstm.make_model(kind=kind, embedding_dim=32, num_blocks=3, num_heads=2, vocab_size=300,
                                slstm_at=[1] if kind == "xlstm" else []).double()
    text, state = [], None
    for turn, temperature in (([5, 290, 17], 0), ([8], 0.8), ([1, 2, 3, 4, 5, 6, 7], 0), ([250], 1.5)):
        expected = model.generate(text + turn, 25, temperature=temperature, seed=3)
        given = [[tensor.clone() for tensor in block] for block in state or []]
        ids, behind = model.generate(torch.tensor(turn), 25, temperature=temperature, seed=3, state=state, return_state=True)
        assert ids == expected == model.generate(turn, 25, temperature=temperature, seed=3, state=state)
        for block, before in zip(state or [], given, strict=True):  # which is kept as it was
            assert all(map(torch.equal, block, before))
        text, state = text + turn + ids, behind
        with torch.no_grad():
            logits, whole = model(torch.tensor([text]))
        for tensors in zip(state, whole, strict=True):
            for tensor, other in zip(*tensors, strict=True):
                torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-8)
                assert not tensor.requires_grad
    ids, state = model.generate(text[:9], 0, return_state=True)
    assert ids == [] and model.generate(text[9:], 5, seed=1, state=state) == model.generate(text, 5, seed=1)
    with torch.no_grad():
        _, state = model(torch.tensor([text[:9]]))
    assert model.generate(text[9:], 5, seed=1, state=state) == model.generate(text, 5, seed=1)


def test_several_texts_go_on_from_their_states():
    """Of any lengths, of which some end before others."""
    torch.manual_seed(5)
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 3, "num_heads": 2, "slstm_at": [1]}}).double()
    for turns in (([1, 2, 3], [4], [5, 6]), ([7, 8], [7, 8], [7, 8])):
        texts, state = [[], [], []], None
        stop = model.generate(list(turns[0]), 20, seed=2)[4]
        for _ in range(3):
            options = {"max_new_tokens": 20, "seed": 2, "stop_token": stop}
            expected = model.generate([text + turn for text, turn in zip(texts, turns)], **options)
            found, state = model.generate(list(turns), **options, state=state, return_state=True)
            assert found == expected
            texts = [text + turn + ids for text, turn, ids in zip(texts, turns, found)]
        assert len({len(text) for text in texts}) > 1
        for row, text in enumerate(texts):
            with torch.no_grad():
                _, alone = model(torch.tensor([text]))
            for tensors in zip(state, alone, strict=True):
                for tensor, other in zip(*tensors, strict=True):
                    torch.testing.assert_close(tensor[row : row + 1], other, rtol=1e-6, atol=1e-8)


def test_a_long_prompt_goes_on_in_pieces():
    """One that is read in several pieces, beside a short one that ends in the first of them."""
    torch.manual_seed(5)
    model = libxlstm.make_model({"model": {"embedding_dim": 16, "num_blocks": 2, "num_heads": 2, "slstm_at": [1]}}).double()
    long, short = torch.randint(256, (9000,)).tolist(), [1, 2]
    _, state = model.generate([[3, 4], [5, 6]], 0, return_state=True)
    expected = [model.generate([3, 4] + long, 5, seed=1), model.generate([5, 6] + short, 5, seed=2)]
    assert model.generate([long, short], 5, seed=1, state=state) == expected


def test_states_that_generate_refuses():
    model = make_model()
    _, state = model.generate([[1], [2]], 3, return_state=True)
    with pytest.raises(RuntimeError, match="state: expected one of 1 sequences, as the batch has them, got one of 2"):
        model.generate([1], 3, state=state)
    with pytest.raises(TypeError, match="state: expected None or what a call returned"):
        model.generate([1], 3, state=state[0])
    with pytest.raises(libxlstm.Error, match="at least one token"):
        model.generate([[1], []], 3, state=state)
    for kind in ("llama", "gpt", "hyena"):
        grows = libxlstm.make_model({"model": {"kind": kind, "embedding_dim": 32, "num_blocks": 1, "num_heads": 2}})
        with pytest.raises(libxlstm.Error, match=f"state: a model of kind {kind} keeps all .* give it the text so far"):
            grows.generate([1], 3, return_state=True)
        with pytest.raises(libxlstm.Error, match="state: a model of kind"):
            grows.generate([1], 3, state=grows(torch.tensor([[1]]))[1])
