"""Log-likelihoods of texts and continuations of prompts under a trained model; lm_eval.py hands them to lm-evaluation-harness.

    judge = Judge.load("runs/demo", dtype="bfloat16")
    judge.score([(judge.tokenizer.encode("The cell"), judge.tokenizer.encode(" keeps"))])    # [(log-likelihood, greedy)]
    judge.generate([judge.tokenizer.encode("The cell")], until=["."])                        # [text]

A context is read once, whatever the number of its continuations: each goes on from the state behind it. Contexts of
different lengths are padded at their beginning, with a reset before their first token, continuations at their end, and
neither leaves a trace; results do not depend on the batch size but for rounding. Where positions are learned (gpt), padding
would use them up: only contexts of one length are read side by side.
"""

import contextlib
import itertools
import json
import os
import warnings

import numpy as np
import torch

import libxlstm
from libxlstm import tokenizer_worker

__all__ = ["Judge", "ScoringError", "Tokenizer", "find_tokenizer", "has_tokenizer", "rolling_windows"]

EXIT_CONFIG, EXIT_DATA = 2, 3
# dtype -> (dtype of the weights, bfloat16 autocast?)
DTYPES = {"float32": (torch.float32, False), "bfloat16": (torch.float32, True), "bfloat16_weights": (torch.bfloat16, False),
          "int8_weights": (torch.int8, False)}
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class ScoringError(ValueError):
    """One line for people, and the exit status of the programs."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Tokenizer:
    """Text <-> token ids as the C++ programs see them. spec: "bytes", a tokenizer.json, or a folder with one, with
    vocab.json and merges.txt, or with encoder.json and vocab.bpe. Of a run: libxlstm.load(RUN).tokenizer."""

    def __init__(self, spec):
        self.spec = str(spec)
        self._tokenizer = None
        self.vocab_size, self.eos_id, self.bos_id = 256, 0, -1  # of bytes: NUL ends a document
        self.companions = {}  # name -> content of the files that belong to it; kept, since a pickle may be read elsewhere
        if self.spec == "bytes":
            return
        files = self._files()
        try:
            self._tokenizer = tokenizer_worker.load(files)
            about = json.loads(tokenizer_worker.hello(self._tokenizer, files))
        except tokenizer_worker.WorkerError as error:
            raise ScoringError(EXIT_DATA, f"{self.spec}: {error}") from error
        self.vocab_size, self.eos_id, self.bos_id = about["vocab_size"], about["eos_id"], about["bos_id"]
        own = {name for names in _TOKENIZER_FILES for name in names}
        self.companions = {name: content for name, content in libxlstm._C.read_tokenizer(self.spec).items() if name not in own}

    def _files(self):
        if os.path.isfile(self.spec):
            return [self.spec]
        for names in _TOKENIZER_FILES:
            files = [os.path.join(self.spec, name) for name in names]
            if all(map(os.path.isfile, files)):
                return files
        raise ScoringError(EXIT_DATA, f"{self.spec}: no tokenizer there; say where it is with tokenizer=PATH, a tokenizer.json "
                                      "or a folder that has one, vocab.json and merges.txt, or encoder.json and vocab.bpe")

    @property
    def start_id(self):
        """What a text without a context follows, as in xlstm-generate: bos_id, a line's end, or the end of a document."""
        if self.bos_id >= 0:
            return self.bos_id
        if self._tokenizer is None:
            return ord("\n")
        if self.eos_id < 0:
            raise ScoringError(EXIT_DATA, f"{self.spec}: no end-of-document token, which texts without a context begin with")
        return self.eos_id

    def encode(self, text):
        """The ids of a text; special tokens written out in it become their ids, none is added."""
        if self._tokenizer is None:
            return list(text.encode("utf-8"))
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text):
        """The ids that xlstm-generate reads for a prompt, as_prompt(encode(text))."""
        return self.as_prompt(self.encode(text))

    def as_prompt(self, ids):
        """The ids behind bos_id, which the source of imported weights may want there (-1: it does not), where they do not begin
        with it themselves; in place of none start_id."""
        if not ids:
            return [self.start_id]
        return ids if self.bos_id in (-1, ids[0]) else [self.bos_id, *ids]

    def decode(self, ids):
        if self._tokenizer is None:
            return bytes(ids).decode("utf-8", "replace")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def sizes(self):
        """UTF-8 bytes of each id's text, (vocab_size); None where a token's text may depend on the tokens before it."""
        if self._tokenizer is None:
            return np.ones(self.vocab_size, np.int64)
        if (json.loads(self._tokenizer.to_str())["decoder"] or {}).get("type") != "ByteLevel":
            return None
        from tokenizers import pre_tokenizers

        alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[token_id] = len(token) if alphabet.issuperset(token) else len(token.encode("utf-8"))
        return sizes

    def token(self, token_id):
        """The text of a token of its own, such as the end of a document."""
        return self._tokenizer.id_to_token(token_id)

    def token_id(self, token):
        """The id of such a text, None where there is none."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def save(self, path):
        """Writes a tokenizer.json. Bytes have none."""
        self._tokenizer.save(path)


def has_tokenizer(folder):
    """Whether the files of a tokenizer are there."""
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in _TOKENIZER_FILES)


def find_tokenizer(folder, configured):
    """The spec of a checkpoint's tokenizer: the folder's own copy where it has one."""
    return folder if configured != "bytes" and has_tokenizer(folder) else configured


def rolling_windows(ids, start, max_length):
    """(context, continuation) of windows that together score each of `ids` once, the first after `start`. A window has at
    most max_length inputs (0: there is one window), the last as much context as fits."""
    ids, windows, done = [start, *ids], [], 1
    size = max_length or len(ids)
    while done < len(ids):
        end = min(done + size, len(ids))
        first = max(0, end - 1 - size)
        windows.append((ids[first:done], ids[done:end]))
        done = end
    return windows


def cut_at(text, stops):
    """(text before the first of the strings, whether one is there)."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def select(state, rows):
    """The state of some sequences, or of some of them several times."""
    return [[tensor.index_select(0, rows) for tensor in block] for block in state]


class Judge:
    """A model and its tokenizer. The model is put into eval mode, moved to the device and, for bfloat16_weights and
    int8_weights, rounded in place.

    device      "cpu", "cuda", "cuda:1", ... or "auto": a GPU where torch sees one
    dtype       float32; bfloat16: autocast, as train.dtype has it; bfloat16_weights: the weights are rounded too;
                int8_weights: as model.quantize() does
    batch_size  sequences side by side
    max_length  inputs of one sequence, contexts lose their beginning beyond; 0: no limit. None: data.seq_len of the run. Of
                gpt it is at most model.max_positions
    max_logits  so many logits are held at a time (float32): longer sequences are read piece by piece
    """

    def __init__(self, model, tokenizer, device="auto", dtype="float32", batch_size=16, max_length=None, max_logits=1 << 27):
        import yaml  # model.settings is YAML

        config = yaml.safe_load(model.settings)
        if config["model"]["input_features"]:
            raise ScoringError(EXIT_CONFIG, "the model reads numbers (model.input_features), not text")
        if dtype not in DTYPES:
            raise ScoringError(EXIT_CONFIG, f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if batch_size < 1:
            raise ScoringError(EXIT_CONFIG, f"batch_size: expected a positive number, got {batch_size}")
        self.max_length = config["data"]["seq_len"] if max_length is None else max_length
        if self.max_length < 0:
            raise ScoringError(EXIT_CONFIG, f"max_length: expected 0 or a positive number, got {max_length}")
        kind = config["model"]["kind"]
        self._positions = config["model"]["max_positions"] if kind == "gpt" else 0  # learned ones; 0: there are none
        if self._positions:
            self.max_length = min(self.max_length or self._positions, self._positions)
        self._trained_length = config["data"]["seq_len"] if kind == "llama" else 0  # where attention knows no farther places
        # With both settings no loss follows the end of a document as an input, neither at once nor through the state. Weights
        # from elsewhere, whose configuration has no training, are used as is usual: after that end.
        trained_here = config["train"]["max_steps"] or config["train"]["max_tokens"]
        apart = config["data"]["reset_state_at_document"] and config["data"]["mask_loss_across_documents"]
        self._end_is_taught = not (trained_here and apart)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vocab_size = config["model"]["vocab_size"]
        if tokenizer.vocab_size > self.vocab_size:
            raise ScoringError(EXIT_DATA, f"the {tokenizer.vocab_size} tokens of {tokenizer.spec} exceed the model's "
                                          f"vocabulary of {self.vocab_size}; use the tokenizer it was trained with")
        self.model, self.tokenizer, self.batch_size, self.max_logits = model, tokenizer, batch_size, max_logits
        self.device = torch.device(device)
        weights, self._autocast = DTYPES[dtype]
        model.to(self.device).eval()
        model.quantize() if weights == torch.int8 else model.to(weights)

    @classmethod
    def load(cls, folder, tokenizer=None, verify=True, **options):
        """Of a run or a checkpoint folder, with the tokenizer it was trained with; `options` as the class takes them."""
        import yaml

        weights, _ = DTYPES.get(options.get("dtype", "float32"), (None, None))  # an unknown one is the class's to refuse
        model = libxlstm.load(folder, verify, dtype=weights)
        configured = yaml.safe_load(model.settings)["data"]["tokenizer"]
        return cls(model, Tokenizer(tokenizer or find_tokenizer(model.folder, configured)), **options)

    def score(self, pairs, on_result=None):
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation after its context; pairs of two
        lists of token ids, neither empty. on_result(index, result) is called as results come. After a context that is but the
        end of a document the first token is scored there, the others from the first on with an empty state, if that is how
        documents began in the training (data.reset_state_at_document, data.mask_loss_across_documents)."""
        return self._score_groups([self._as_trained(*pair) for pair in pairs], on_result)

    def score_rolling(self, texts, on_result=None):
        """The log-likelihood of each text, a list of token ids, all its tokens counted, in windows of max_length."""
        groups = [[part for window in rolling_windows(ids, self.tokenizer.start_id, self.max_length)
                   for part in self._as_trained(*window)] for ids in texts]
        results = self._score_groups(groups, on_result and (lambda index, result: on_result(index, result[0])))
        return [total for total, _ in results]

    def _as_trained(self, context, continuation):
        """The pair, or those that take its place: training reads no token before a document's first one."""
        if self._end_is_taught or list(context) != [self.tokenizer.eos_id] or len(continuation) < 2:
            return [(context, continuation)]
        return [(context, continuation[:1]), (continuation[:1], continuation[1:])]

    def _score_groups(self, groups, on_result):
        """(sum of the log-likelihoods, whether all are greedy) of the pairs of each group."""
        owners = [index for index, group in enumerate(groups) for _ in group]
        results, missing = [(0.0, True)] * len(groups), list(map(len, groups))

        def add(place, result):
            index = owners[place]
            results[index] = (results[index][0] + result[0], results[index][1] and result[1])
            missing[index] -= 1
            if on_result and missing[index] == 0:
                on_result(index, results[index])

        self._score_pairs([pair for group in groups for pair in group], add)
        return results

    def _score_pairs(self, pairs, on_result):
        num_cut, contexts = 0, {}  # tokens -> indices of the pairs that share them
        for index, (context, continuation) in enumerate(pairs):
            self._check(context, "context"), self._check(continuation, "continuation")
            if self._positions and len(continuation) > self._positions:
                raise ScoringError(EXIT_DATA, f"a continuation has {len(continuation)} tokens, but the model has learned "
                                              f"positions for {self._positions} (model.max_positions)")
            room = max(1, self.max_length + 1 - len(continuation)) if self.max_length else len(context)
            num_cut += len(context) > room
            contexts.setdefault(tuple(context[-room:]), []).append(index)
        self._tell_cut(num_cut, len(pairs), f"max_length={self.max_length}")
        with self._computing():
            for batch in self._batches(sorted(contexts, key=len, reverse=True), len):
                logits, state = self._read(batch)
                asked = [(row, index) for row, context in enumerate(batch) for index in contexts[context]]
                asked.sort(key=lambda pair: -len(pairs[pair[1]][1]))
                for part in self._batches(asked):
                    rows = torch.tensor([row for row, _ in part], device=self.device)
                    found = self._score_rows(logits, state, rows, [pairs[index][1] for _, index in part])
                    for (_, index), result in zip(part, found):
                        on_result(index, result)

    def generate(self, prompts, until=(), max_tokens=256, temperature=0.0, top_k=0, top_p=1.0, on_result=None):
        """The text after each prompt (token ids) before the first of the strings `until`, before the end of the document, or of
        max_tokens. Temperature 0 is greedy; otherwise torch's generator draws, among the top_k likeliest tokens (0: all), or
        among the likeliest that hold the probability top_p. Prompts of gpt leave room for max_tokens."""
        if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ScoringError(EXIT_CONFIG, "expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
                                            f"got {temperature}, {top_k} and {top_p}")
        for prompt in prompts:
            self._check(prompt, "prompt")
        prompts = self._with_room(prompts, max_tokens)
        texts = [""] * len(prompts)
        with self._computing():
            indices = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
            for batch in self._batches(indices, lambda index: len(prompts[index])):
                found = self._continue([prompts[index] for index in batch], [stop for stop in until if stop], max_tokens,
                                       lambda logits: draw(logits, temperature, top_k, top_p))
                for index, text in zip(batch, found):
                    texts[index] = text
                    if on_result:
                        on_result(index, text)
        return texts

    def _with_room(self, prompts, max_tokens):
        """The prompts, cut where they must be."""
        room, why = self.max_length, f"max_length={self.max_length}"
        if self._positions and self._positions - max_tokens + 1 < room:  # the last token is not read
            room = self._positions - max_tokens + 1
            why = f"{room}, which leaves max_tokens={max_tokens} of the {self._positions} learned positions,"
        if self._positions and room < 1:
            raise ScoringError(EXIT_CONFIG, f"max_tokens={max_tokens} leaves no room for a prompt: the model has learned "
                                            f"positions for {self._positions} tokens (model.max_positions)")
        if room:
            self._tell_cut(sum(len(prompt) > room for prompt in prompts), len(prompts), why)
            prompts = [prompt[-room:] for prompt in prompts]
        beyond = sum(len(prompt) + max_tokens - 1 > self._trained_length for prompt in prompts) if self._trained_length else 0
        if beyond:
            warnings.warn(f"a prompt and max_tokens={max_tokens} together may exceed the {self._trained_length} tokens of the "
                          f"model's training: {beyond} of {len(prompts)}; a smaller max_length or max_tokens avoids that",
                          stacklevel=3)
        return prompts

    def _continue(self, prompts, stops, max_tokens, choose):
        ids = [[] for _ in prompts]
        near = 1 + max((len(stop.encode()) for stop in stops), default=0)  # tokens that hold a stop: each is a byte at least
        alive = list(range(len(prompts)))  # the prompts that the rows of the state belong to

        def has_stop(tokens):
            return cut_at(self.tokenizer.decode(tokens), stops)[1]

        logits, state = self._read(prompts)
        for step in range(max_tokens):
            tokens = choose(logits[:, : self.tokenizer.vocab_size])
            going = []
            for place, (index, token) in enumerate(zip(alive, tokens.tolist())):
                if token == self.tokenizer.eos_id:
                    continue
                ids[index].append(token)
                if not (stops and has_stop(ids[index][-near:]) and has_stop(ids[index])):
                    going.append(place)
            if not going or step + 1 == max_tokens:
                break
            if len(going) < len(alive):
                rows = torch.tensor(going, device=self.device)
                tokens, state, alive = tokens[rows], select(state, rows), [alive[place] for place in going]
            logits, state = self.model(tokens.unsqueeze(1), state)
            logits = logits[:, -1]
        return [cut_at(self.tokenizer.decode(tokens), stops)[0] for tokens in ids]

    def _score_rows(self, logits, state, rows, continuations):
        """Row `rows[i]` of the logits (B,V) and of the state goes on with continuations[i]."""
        length = max(map(len, continuations))
        padded = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in continuations])
        counted = torch.arange(length) < torch.tensor(list(map(len, continuations))).unsqueeze(1)
        padded, counted = padded.to(self.device), counted.to(self.device)
        total = torch.zeros(len(continuations), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(continuations), dtype=torch.bool, device=self.device)

        def add(logits, first):
            span = slice(first, first + logits.size(1))
            targets, known = padded[:, span], counted[:, span]
            likelihoods = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double() - logits.logsumexp(-1).double()
            total.add_(likelihoods.masked_fill(~known, 0).sum(1))
            greedy.logical_and_(((logits.argmax(-1) == targets) | ~known).all(1))

        add(logits.index_select(0, rows).unsqueeze(1), 0)
        if length > 1:
            for first, more, _ in self._pieces(padded[:, :-1], select(state, rows)):
                add(more, first + 1)
        return list(zip(total.tolist(), greedy.tolist()))

    def _read(self, contexts):
        """Logits (B,V) of the token after each context, and the state there."""
        length = max(map(len, contexts))
        ids = torch.tensor([[*[0] * (length - len(context)), *context] for context in contexts])
        reset = None
        if any(len(context) < length for context in contexts):
            reset = torch.arange(length) == torch.tensor([length - len(context) for context in contexts]).unsqueeze(1)
        for _, logits, state in self._pieces(ids, None, reset):
            last = logits[:, -1].clone()
        return last, state

    def _pieces(self, ids, state, reset=None):
        """(first position, logits, state behind) of pieces of ids (B,T)."""
        width = max(1, self.max_logits // (len(ids) * self.vocab_size))
        for first in range(0, ids.size(1), width):
            piece = slice(first, first + width)
            starts = None if reset is None else reset[:, piece].to(self.device)
            logits, state = self.model(ids[:, piece].to(self.device), state, starts)
            yield first, logits, state

    def _batches(self, items, length=None):
        """Of what is to be read from its beginning, and is sorted by its length: of equal ones where positions are learned."""
        alike = [list(group) for _, group in itertools.groupby(items, length)] if length and self._positions else [items]
        return [group[first : first + self.batch_size] for group in alike for first in range(0, len(group), self.batch_size)]

    def _tell_cut(self, count, total, limit):
        if count:
            warnings.warn(f"contexts longer than {limit} lose their beginning: {count} of {total}", stacklevel=4)

    def _check(self, ids, name):
        if len(ids) == 0:
            raise ScoringError(EXIT_DATA, f"a {name} without a token cannot be scored or continued")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ScoringError(EXIT_DATA, f"a {name} has tokens from {min(ids)} to {max(ids)}, outside the model's vocabulary "
                                          f"of {self.vocab_size}; use the tokenizer it was trained with")

    @contextlib.contextmanager
    def _computing(self):
        """No gradients; bfloat16 matrix products where wanted, with one bfloat16 copy of the weights."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            yield


def draw(logits, temperature, top_k, top_p):
    """A token for each row of logits (B,V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.size(-1):  # of equal ones the lowest ids, as xlstm-generate has it
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        logits = logits.scatter(-1, order[:, top_k:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:  # the shortest head that holds top_p, at least one token
        sorted_, order = probabilities.sort(-1, descending=True)
        sorted_ = sorted_.masked_fill(sorted_.cumsum(-1) - sorted_ >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, sorted_)
    return torch.multinomial(probabilities, 1).squeeze(-1)
