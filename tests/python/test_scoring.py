"""libxlstm.scoring: log-likelihoods and continuations against the logits of single sequences, whatever is put side by side."""

import subprocess
import sys
import warnings

import pytest
import torch

import libxlstm
from libxlstm.scoring import Judge, ScoringError, Tokenizer, cut_at, draw, find_tokenizer, rolling_windows

YAML = """
model: {{kind: {kind}, vocab_size: {vocab}, embedding_dim: 32, num_blocks: 2, num_heads: 2{more}}}
data: {{seq_len: 64, tokenizer: {tokenizer}{data}}}
train: {{max_steps: {steps}}}
"""
MORE = {"xlstm": ", slstm_at: [1]", "gpt": ", max_positions: 64"}


def make_yaml(kind="xlstm", vocab=260, tokenizer="bytes", data="", steps=500):
    return YAML.format(kind=kind, vocab=vocab, tokenizer=tokenizer, data=data, steps=steps, more=MORE.get(kind, ""))


def make_model(kind="xlstm", **options):
    """With a sharp head: wrong states would move log-likelihoods by far more than rounding. The likeliest token is a byte, and
    not the one that ends a document."""
    torch.manual_seed(3)
    model = libxlstm.make_model(make_yaml(kind, **options))
    model.eval()
    with torch.no_grad():
        head = dict(model.named_parameters())["lm_head.weight"]
        head.mul_(10)
        head[0], head[256:] = 0, 0
    return model


def make_judge(kind="xlstm", data="", steps=500, **options):
    return Judge(make_model(kind, data=data, steps=steps), Tokenizer("bytes"), device="cpu", **options)


def by_hand(model, context, continuation):
    """One sequence, all its logits, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation[:-1]]]))[0][0, len(context) - 1:].double()
    targets = torch.tensor(continuation)
    total = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


def greedy_by_hand(model, prompt, count):
    """The whole sequence anew for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids[len(prompt):]


def random_ids(length, seed):
    return torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_pairs(model):
    """Contexts of many lengths, one of them shared; continuations that greedy decoding gives and others."""
    contexts = [random_ids(length, 50 + i) for i, length in enumerate((1, 2, 5, 13, 13, 30, 41))]
    pairs = [(context, random_ids(1 + i % 4, 100 + i)) for i, context in enumerate(contexts)]
    pairs += [(contexts[3], random_ids(length, length)) for length in (1, 3, 7, 2)]
    pairs += [(contexts[i], greedy_by_hand(model, contexts[i], 3)) for i in (0, 3, 5)]
    pairs += [(contexts[5], [*pairs[-1][1][:-1], (pairs[-1][1][-1] + 1) % 256])]  # wrong in its last token alone
    return pairs


@pytest.mark.parametrize("kind", ["xlstm", "xlstm_large", "llama", "gpt", "mamba", "hyena"])
def test_scores_are_those_of_single_sequences(kind):
    judge = make_judge(kind)
    pairs = make_pairs(judge.model)
    expected = [by_hand(judge.model, *pair) for pair in pairs]
    assert [greedy for _, greedy in expected][-4:] == [True, True, True, False]
    other_context = by_hand(judge.model, pairs[4][0], pairs[7][1])[0]
    assert abs(other_context - expected[7][0]) > 1e-2, "the context must matter for this test to see a wrong state"
    for batch_size, max_logits in ((1, 1 << 20), (3, 1 << 20), (64, 1 << 20), (64, 1), (4, 4 * 260 * 8)):
        judge.batch_size, judge.max_logits = batch_size, max_logits
        found = judge.score(pairs)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5, abs=1e-4)


def test_a_shared_context_is_read_once():
    class Counting:
        def __init__(self, model):
            self.model, self.tokens = model, 0

        def __call__(self, ids, *rest):
            self.tokens += ids.numel()
            return self.model(ids, *rest)

    judge = make_judge()
    judge.model = counting = Counting(judge.model)
    context = random_ids(50, 1)
    judge.score([(context, random_ids(4, seed)) for seed in range(8)])
    assert counting.tokens == 50 + 8 * 3  # the last token of a continuation is only asked for


def test_results_are_told_as_they_come():
    judge = make_judge(batch_size=2)
    told = {}
    pairs = make_pairs(judge.model)
    assert judge.score(pairs, told.__setitem__) == [told[i] for i in range(len(pairs))]
    texts = [random_ids(length, length) for length in (3, 200, 70)]
    told = {}
    assert judge.score_rolling(texts, told.__setitem__) == [told[i] for i in range(3)]
    told = {}
    prompts = [ids[:60] for ids in texts]
    assert judge.generate(prompts, max_tokens=3, on_result=told.__setitem__) == [told[i] for i in range(3)]


def test_contexts_lose_their_beginning_beyond_max_length():
    judge = make_judge(max_length=20)
    context, continuation = random_ids(40, 1), random_ids(5, 2)
    with pytest.warns(UserWarning, match="longer than max_length=20 lose their beginning: 1 of 2"):
        (total, _), = judge.score([(context, continuation), (context[:16], continuation)])[:1]
    assert total == pytest.approx(by_hand(judge.model, context[-16:], continuation)[0], abs=1e-4)
    long = random_ids(30, 3)  # all of it is scored, after one token of context
    with pytest.warns(UserWarning):
        (total, _), = judge.score([(context, long)])
    with pytest.warns(UserWarning):
        assert judge.generate([context], max_tokens=3) == judge.generate([context[-20:]], max_tokens=3)
    assert total == pytest.approx(by_hand(judge.model, context[-1:], long)[0], abs=1e-4)
    judge.max_length = 0
    (total, _), = judge.score([(context * 3, continuation)])
    assert total == pytest.approx(by_hand(judge.model, context * 3, continuation)[0], abs=1e-4)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 29])
def test_windows_score_every_token_once_with_as_much_context_as_fits(length):
    ids = list(range(1, length + 1))
    windows = rolling_windows(ids, 0, 8)
    assert sum((list(continuation) for _, continuation in windows), []) == ids
    for context, continuation in windows:
        end = continuation[-1] + 1
        assert context + continuation == list(range(max(0, end - 1 - 8), end)) and context
    assert rolling_windows(ids, 0, 0) == ([([0], ids)] if ids else [])


def test_rolling_is_the_sum_of_windows():
    judge = make_judge(batch_size=3)
    judge.max_length = 10
    texts = [random_ids(length, length) for length in (4, 35, 10, 0)]
    expected = [sum(by_hand(judge.model, *window)[0] for window in rolling_windows(ids, 10, 10)) for ids in texts]
    assert judge.score_rolling(texts) == pytest.approx(expected, rel=1e-5, abs=1e-4) and expected[3] == 0
    judge.max_length = 0  # one window: the state goes on
    assert judge.score_rolling(texts[1:2]) == pytest.approx([by_hand(judge.model, [10], texts[1])[0]], rel=1e-5)


def test_learned_positions_are_enough_for_windows_of_all_of_them():
    judge = make_judge("gpt", batch_size=8)
    assert judge.max_length == make_judge("gpt", max_length=0).max_length == make_judge("gpt", max_length=65).max_length == 64
    texts = [random_ids(length, length) for length in (4, 64, 65, 150, 31)]
    expected = [sum(by_hand(judge.model, *window)[0] for window in rolling_windows(ids, 10, 64)) for ids in texts]
    assert judge.score_rolling(texts) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    pairs = [(random_ids(length, length), random_ids(count, count)) for length, count in ((60, 5), (3, 62), (64, 1), (3, 5))]
    expected = [by_hand(judge.model, *pair)[0] for pair in pairs]
    assert [total for total, _ in judge.score(pairs)] == pytest.approx(expected, rel=1e-5, abs=1e-4)
    with pytest.raises(ScoringError, match="a continuation has 65 tokens, but the model has learned positions for 64"):
        judge.score([([1], random_ids(65, 1))])


@pytest.mark.parametrize("data, steps, apart", [
    ("", 500, True), ("", 0, False), (", mask_loss_across_documents: false", 500, False),
    (", reset_state_at_document: false", 500, False)])
def test_texts_begin_as_documents_do_in_training(data, steps, apart):
    """Where states are emptied at documents and no loss crosses their borders, no loss follows the end of a document. What was
    not trained here, in no step, is not known to be so."""
    judge = make_judge(data=data, steps=steps, max_length=10)
    end = judge.tokenizer.eos_id = judge.tokenizer.start_id
    texts = [random_ids(length, length) for length in (1, 2, 8, 35)]

    def of_packed_documents(context, continuation):
        ids, reset = [*context, *continuation[:-1]], None
        if apart and context == [end]:
            reset = torch.arange(len(ids)).unsqueeze(0) == 1
        with torch.no_grad():
            logits = judge.model(torch.tensor([ids]), None, reset)[0][0, len(context) - 1:].double()
        targets = torch.tensor(continuation)
        return (logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum().item(), bool((logits.argmax(-1) == targets).all()))

    first = greedy_by_hand(judge.model, [end], 1)
    greedy = first + greedy_by_hand(judge.model, first if apart else [end, *first], 4)
    pairs = [([end], text) for text in [*texts[:3], greedy, [*first, *texts[0]]]] + [([end, 7], texts[2]), ([7], texts[2])]
    told = {}
    expected = [of_packed_documents(*pair) for pair in pairs]
    found = judge.score(pairs, told.__setitem__)
    assert found == [told[i] for i in range(len(pairs))]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5, abs=1e-4)
    assert [right for _, right in found] == [right for _, right in expected] and found[3][1] and not found[4][1]
    plain = by_hand(judge.model, *pairs[2])[0]
    assert (abs(plain - found[2][0]) > 1e-2) == apart, "what is read before must matter for this test to see it"
    told = {}
    expected = [sum(of_packed_documents(*window)[0] for window in rolling_windows(ids, end, 10)) for ids in texts]
    assert judge.score_rolling(texts, told.__setitem__) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert len(told) == len(texts)


@pytest.mark.parametrize("kind", ["xlstm", "llama", "gpt", "hyena"])
def test_generation_is_greedy_decoding_step_by_step(kind):
    judge = make_judge(kind)
    prompts = [random_ids(length, length) for length in (3, 17, 1, 8)]
    expected = [greedy_by_hand(judge.model, prompt, 12) for prompt in prompts]
    texts = [judge.tokenizer.decode(ids) for ids in expected]
    for batch_size in (1, 3, 8):
        judge.batch_size = batch_size
        assert judge.generate(prompts, max_tokens=12) == texts
        # Each stops at another step, while the others go on.
        stop, other = texts[1][4:6], texts[3][2]
        assert judge.generate(prompts, until=["", stop, other], max_tokens=12) == [cut_at(t, [stop, other])[0] for t in texts]
    assert judge.generate(prompts, max_tokens=0) == [""] * 4
    judge.tokenizer.eos_id = expected[0][5]
    first = judge.generate(prompts[:1], max_tokens=12)
    assert first == [judge.tokenizer.decode(expected[0][:expected[0].index(judge.tokenizer.eos_id)])]


def test_a_token_costs_the_same_however_long_the_text_is(monkeypatch):
    judge, decoded = make_judge(), []
    whole, decode = judge.generate([random_ids(5, 1)], max_tokens=200)[0], judge.tokenizer.decode
    monkeypatch.setattr(judge.tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stop = "a stop that never comes, of many characters \u20ac"
    assert judge.generate([random_ids(5, 1)], until=[stop], max_tokens=200) == [whole]
    assert max(decoded[:-1]) < 60 and sum(decoded) < 200 * 60


def test_a_stop_of_several_tokens_is_found(monkeypatch):
    judge = make_judge()
    text = [*"one ".encode(), *"\u20ac stop".encode(), *b"not this"]
    monkeypatch.setattr("libxlstm.scoring.draw", lambda logits, *_, ids=iter(text): torch.tensor([next(ids)]))
    assert judge.generate([[1]], until=["never", "\u20ac stop"], max_tokens=len(text)) == ["one "]


def test_prompts_leave_room_where_positions_are_learned():
    judge = make_judge("gpt")
    prompts = [random_ids(60, 1), random_ids(53, 2)]  # 53 and the first 11 of 12 new tokens are 64
    expected = [judge.tokenizer.decode(greedy_by_hand(judge.model, prompt[-53:], 12)) for prompt in prompts]
    with pytest.warns(UserWarning, match="longer than 53, which leaves max_tokens=12 of the 64 learned .*: 1 of 2"):
        assert judge.generate(prompts, max_tokens=12) == expected
    with pytest.warns(UserWarning):
        assert judge.generate(prompts[:1], max_tokens=64) == [
            judge.tokenizer.decode(greedy_by_hand(judge.model, prompts[0][-1:], 64))]
    with pytest.raises(ScoringError, match="max_tokens=65 leaves no room for a prompt") as caught:
        judge.generate(prompts, max_tokens=65)
    assert caught.value.code == 2


def test_rotated_positions_beyond_the_training_are_told():
    prompts = [random_ids(60, 1), random_ids(53, 2)]
    judge = make_judge("llama")
    with pytest.warns(UserWarning, match="max_tokens=12 together may exceed the 64 tokens of the model's training: 1 of 2"):
        texts = judge.generate(prompts, max_tokens=12)
    assert texts[0] == judge.tokenizer.decode(greedy_by_hand(judge.model, prompts[0], 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.generate(prompts[1:], max_tokens=12)
        make_judge().generate(prompts, max_tokens=12)  # a recurrent state has no positions


def test_generation_stays_within_the_tokenizers_tokens():
    judge = make_judge()
    prompt = random_ids(5, 1)
    likeliest = greedy_by_hand(judge.model, prompt, 1)
    assert judge.score([(prompt, likeliest)])[0][1]
    with torch.no_grad():
        head = dict(judge.model.named_parameters())["lm_head.weight"]
        head[258] = 2 * head[likeliest[0]]
    assert greedy_by_hand(judge.model, prompt, 1) == [258] and not judge.score([(prompt, likeliest)])[0][1]
    assert judge.generate([prompt], max_tokens=1) == [judge.tokenizer.decode(likeliest)]


def test_cut_at_the_first_of_the_strings():
    assert cut_at("one. two, three", [",", ". "]) == ("one", True)
    assert cut_at("one", [","]) == ("one", False) and cut_at("one", []) == ("one", False)


def test_draws():
    torch.manual_seed(1)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)

    def shares(*options):
        return (torch.bincount(draw(logits, *options), minlength=4) / 20_000).tolist()

    assert shares(0, 0, 1) == [1, 0, 0, 0] == shares(1, 1, 1) == shares(1, 0, 0.4)
    assert shares(1, 0, 1) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert shares(1, 2, 1) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    assert shares(1, 0, 0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    square = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert shares(0.5, 0, 1) == pytest.approx((square / square.sum()).tolist(), abs=0.02)


def test_sampled_text_follows_torchs_seed():
    judge = make_judge()
    prompts = [random_ids(5, 1)] * 2

    def sample():
        torch.manual_seed(4)
        return judge.generate(prompts, max_tokens=20, temperature=2.0)

    texts = sample()
    assert texts == sample() and texts[0] != texts[1]


def test_dtypes():
    pairs = make_pairs(make_model())
    exact = [total for total, _ in make_judge().score(pairs)]
    autocast = [total for total, _ in make_judge(dtype="bfloat16").score(pairs)]
    rounded = make_judge(dtype="bfloat16_weights")
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}
    weights = [total for total, _ in rounded.score(pairs)]
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = [by_hand(model, *pair)[0] for pair in pairs]
    assert autocast != exact and weights != exact and weights != autocast
    assert autocast == pytest.approx(expected, rel=0.05, abs=0.2)
    assert weights == pytest.approx(exact, rel=0.1, abs=0.3)


def test_of_a_checkpoint_folder_with_bytes(tmp_path):
    model = make_model()
    libxlstm._C.save_model_folder(str(tmp_path / "model"), make_yaml(), {k: v.detach() for k, v in model.named_parameters()})
    judge = Judge.load(tmp_path / "model", device="cpu")
    assert judge.max_length == 64 and judge.tokenizer.spec == "bytes" and judge.tokenizer.start_id == ord("\n")
    encode = judge.tokenizer.encode
    text, = judge.generate([encode("caf\u00e9 ")], max_tokens=4)
    (total, greedy), = judge.score([(encode("caf\u00e9 "), greedy_by_hand(model, encode("caf\u00e9 "), 4))])
    assert greedy and total < 0 and text == judge.tokenizer.decode(greedy_by_hand(model, encode("caf\u00e9 "), 4))
    assert judge.tokenizer.decode(encode("caf\u00e9")) == "caf\u00e9" and judge.tokenizer.decode([0xC3]) == "\ufffd"


def train_tokenizer(special=("<|endoftext|>",)):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["the cell keeps the state and the gate reads the cell"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=275, special_tokens=list(special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def test_a_checkpoint_has_its_own_tokenizer(tmp_path):
    words = train_tokenizer()
    words.save(str(tmp_path / "words.json"))
    yaml = make_yaml(vocab=280, tokenizer=tmp_path / "words.json")
    model = make_model(vocab=280, tokenizer=tmp_path / "words.json")
    libxlstm._C.save_model_folder(str(tmp_path / "model"), yaml, {k: v.detach() for k, v in model.named_parameters()})
    (tmp_path / "words.json").rename(tmp_path / "other.json")
    judge = Judge.load(tmp_path / "model", device="cpu")
    assert judge.tokenizer.spec == str(tmp_path / "model") and judge.tokenizer.vocab_size == 275
    ids = judge.tokenizer.encode("the cell \u00e9")
    assert ids == words.encode("the cell \u00e9").ids and len(ids) < 10 and judge.tokenizer.decode(ids) == "the cell \u00e9"
    assert judge.tokenizer.start_id == judge.tokenizer.eos_id == words.token_to_id("<|endoftext|>")
    assert Judge.load(tmp_path / "model", tmp_path / "other.json", device="cpu").tokenizer.encode("the cell") == ids[:len(
        words.encode("the cell").ids)]

    (tmp_path / "gpt2").mkdir()
    words.model.save(str(tmp_path / "gpt2"))  # vocab.json and merges.txt
    assert Tokenizer(tmp_path / "gpt2").encode("the cell keeps") == words.encode("the cell keeps").ids
    assert find_tokenizer(tmp_path / "gpt2", "x") == tmp_path / "gpt2" and find_tokenizer(tmp_path / "gpt2", "bytes") == "bytes"
    assert find_tokenizer(tmp_path, "x") == "x"


def test_errors_say_what_is_wrong(tmp_path):
    judge = make_judge()
    with pytest.raises(ScoringError, match="continuation has tokens from 3 to 260, outside the model's vocabulary of 260"):
        judge.score([([1], [260, 3])])
    with pytest.raises(ScoringError, match="prompt has tokens from -1"):
        judge.generate([[-1]])
    with pytest.raises(ScoringError, match="a continuation without a token"):
        judge.score([([1], [])])
    with pytest.raises(ScoringError, match="temperature >= 0"):
        judge.generate([[1]], temperature=-1)
    with pytest.raises(ScoringError, match="no tokenizer there; say where it is with tokenizer=PATH"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ScoringError, match="not a tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(ScoringError, match="the 256 tokens of bytes exceed the model's vocabulary of 40") as caught:
        Judge(make_model(vocab=40), Tokenizer("bytes"), device="cpu")
    assert caught.value.code == 3
    for options in ({"dtype": "float16"}, {"batch_size": 0}, {"max_length": -1}):
        with pytest.raises(ScoringError, match=next(iter(options))) as caught:
            make_judge(**options)
        assert caught.value.code == 2
    train_tokenizer(special=["<pad>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ScoringError, match="no end-of-document token"):
        Tokenizer(tmp_path).start_id  # noqa: B018


def test_without_the_harness_the_command_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import libxlstm.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and 'pip install "lm_eval>=0.4"' in done.stderr.strip().splitlines()[-1]


def test_draw_ranks_as_the_programs_do():
    """Of equal logits the lowest ids, and temperatures down to nothing."""
    logits = torch.zeros(400, 8)
    assert set(draw(logits, 1.0, 3, 1.0).tolist()) == {0, 1, 2}
    logits[:, 5] = 1e-3
    assert set(draw(logits, 1.0, 2, 1.0).tolist()) == {0, 5}
    assert set(draw(logits, 1e-320, 0, 1.0).tolist()) == {5}
    assert len(set(draw(torch.zeros(50, 2), 1.0, 0, 0.5).tolist())) == 1  # one of two equal ones holds a half


def test_a_judge_drops_nothing():
    torch.manual_seed(3)
    model = libxlstm.make_model({"model": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "dropout": 0.5}})
    judge = Judge(model, Tokenizer("bytes"), device="cpu")
    pair = [(list(b"the"), list(b" cell"))]
    assert judge.score(pair) == judge.score(pair) and not model.training


def test_a_group_is_greedy_where_all_its_parts_are():
    judge, told = object.__new__(Judge), [(-1.0, False), (-2.0, True), (-4.0, True)]
    judge._score_pairs = lambda pairs, on_result: [on_result(place, result) for place, result in enumerate(told)]
    assert judge._score_groups([[("a", "b"), ("b", "c")], [("d", "e")]], None) == [(-3.0, False), (-4.0, True)]
