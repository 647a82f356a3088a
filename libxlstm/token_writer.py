"""Token files of ids that are there already. Needs numpy, which libxlstm alone does not: loaded when it is asked for."""

import os

import numpy as np
import torch

from .arguments import integer
from .library import load_module


class TokenWriter:
    """Writes the token files that xlstm-data prepare writes, of text that is tokenized already:

        with libxlstm.TokenWriter("data/corpus", "tokenizer.json") as writer:
            for row in dataset:                  # datasets.load_from_disk(FOLDER).with_format("numpy"), or lines of JSONL by
                writer.add(row["input_ids"])     # map(json.loads, open("corpus.jsonl")); each is a document. Rows that are
                                                 # blocks of one long text (group_texts) are parts of a stream instead
        with libxlstm.TokenWriter("data/train", "gpt2") as writer:
            writer.add_stream(numpy.memmap("train.bin", "uint16", "r"))                  # nanoGPT's: documents in a row
            # writer.add_stream(numpy.memmap("shard.bin", "uint16", "r", offset=1024))  # llm.c's: behind its header
        with libxlstm.TokenWriter("data/chats", "tokenizer.json") as writer:
            for row in dataset:                  # of trl: answers count in the loss, prompts are read alone
                writer.add(row["input_ids"], mask=row["completion_mask"])       # or assistant_masks, or labels=row["labels"]

    prefix: PREFIX.bin, .idx and .meta.json, and .loss where not all ids count, are written at the end of the with block, or
    by finish(); after an exception nothing is. tokenizer: the one whose ids they are, "bytes", a tokenizer.json, or a folder
    with one, with vocab.json and merges.txt, or with encoder.json and vocab.bpe; it is recorded for training, sampling and
    evaluation, and ids beyond it are errors. eos_id: the token that ends documents; None: the tokenizer's. count_bytes: the
    UTF-8 bytes of the documents' texts are counted, special tokens included; where the tokenizer is no byte-level BPE they
    are decoded for that, which takes most of the time. Without, bits per byte are unknown, as only held-out data needs them.
    overwrite: token files of this prefix are replaced; else they are an error.

    Which ids count in the loss is said for each call, by one of two; by neither, all do. mask: (T), 1 or True for those that
    count, 0 or False for those that are read alone. labels: (T), as models of transformers take them: the ids themselves, not
    shifted, and -100 in place of those that do not count.

    Raises libxlstm.Error, and ValueError for ids that are no integers in one row and for what does not fit them.
    """

    def __init__(self, prefix, tokenizer, eos_id=None, count_bytes=True, overwrite=False):
        from .scoring import Tokenizer

        self.prefix = os.fspath(prefix)
        self._tokenizer = Tokenizer(os.fspath(tokenizer))
        self.vocab_size = self._tokenizer.vocab_size
        self.eos_id = self._tokenizer.eos_id if eos_id is None else integer("eos_id", eos_id, 0, self.vocab_size - 1)
        self._count_bytes, self._num_bytes, self._num_counted_bytes = bool(count_bytes), 0, 0
        self._sizes = self._tokenizer.sizes() if count_bytes else None
        self._held, self._num_held = [], 0  # parts of the document under construction, and their ids
        self._inside = False  # a part of it is written
        self._last_counts = True  # the last id that is written counts
        self._finished = False
        self._core = load_module().TokenWriter(self.prefix, self.vocab_size, bool(overwrite))

    def add(self, ids, *, mask=None, labels=None):
        """A document: a list, an array or a tensor of integers (T), with the end-of-document token at its end or without, which
        then is added where the tokenizer has one, and counts if the last id does. One without other tokens is left out, as
        prepare leaves out empty texts."""
        ids, counted = _tokens(ids, mask, labels)
        self._end_document()
        if self.eos_id >= 0 and len(ids) > 0 and ids[-1] == self.eos_id:
            self._append(ids[:-1], counted[:-1])
            self._end_document(counted[-1])
        else:
            self._append(ids, counted)
            self._end_document()

    def add_stream(self, ids, *, mask=None, labels=None):
        """Documents in a row (T), each but the last with the end-of-document token at its end; those without other tokens are
        left out. The last one goes on in the next call, up to add() or finish(). Arrays are read piece by piece."""
        if self.eos_id < 0:
            raise ValueError(f"add_stream: the tokenizer {self._tokenizer.spec} has no end-of-document token, which parts "
                             "documents; give its id as eos_id, or documents one by one to add()")
        _check_lengths(ids, mask, labels)
        for first in range(0, len(ids), _PIECE):
            parts = [None if row is None else row[first:first + _PIECE] for row in (ids, mask, labels)]
            try:
                piece, counted = _tokens(*parts, first)
            except ValueError:
                if first > 0:
                    self._core = None  # an error in the midst of a stream is the end
                raise
            start = 0
            for end in np.flatnonzero(piece == self.eos_id).tolist():
                self._append(piece[start:end], counted[start:end])
                self._end_document(counted[end])
                start = end + 1
            self._append(piece[start:].copy(), counted[start:])  # it is held, and the caller may use its array again

    def finish(self):
        """Writes the files; the writer takes nothing more."""
        self._end_document()
        core = self._open()
        if core.num_documents == 0:
            raise ValueError(f"{self.prefix}: no ids were given; nothing is written")
        core.finish(self._tokenizer.spec, self.eos_id, self._num_bytes, self._num_counted_bytes,
                    f"libxlstm.TokenWriter({self.prefix!r}, {self._tokenizer.spec!r})")
        self._core, self._finished = None, True

    @property
    def num_documents(self):
        return self._open().num_documents

    @property
    def num_tokens(self):
        return self._open().num_tokens

    @property
    def num_counted_tokens(self):
        """Of them, those that count in the loss."""
        return self._open().num_counted_tokens

    def _open(self):
        if self._core is None:
            raise ValueError(f"{self.prefix}: this TokenWriter has ended, by finish() or by an error")
        return self._core

    def _append(self, ids, counted):
        self._held.append((ids, counted))
        self._num_held += len(ids)
        if self._num_held >= _PIECE:
            self._write()

    def _write(self):
        ids, counted = (np.concatenate(parts) for parts in zip(*self._held))
        self._held, self._num_held, self._inside, self._last_counts = [], 0, True, counted[-1]
        core, self._core = self._open(), None  # an error in the midst of a document is the end
        core.append(ids, counted)
        if self._count_bytes:
            self._num_bytes, self._num_counted_bytes = (
                before + new for before, new in zip((self._num_bytes, self._num_counted_bytes), self._bytes(ids, counted)))
        self._core = core

    def _bytes(self, ids, counted):
        """UTF-8 bytes of the texts of ids, and of those that count."""
        if self._sizes is not None:
            sizes = self._sizes[ids]
            return int(sizes.sum()), int(sizes[counted].sum())
        num_bytes, before = [0, 0], []  # before: the id before, which a token may be parted from by a space
        for run, counts in zip(*_runs(ids, counted)):
            num_bytes[counts] += self._decoded_bytes(before + run) - self._decoded_bytes(before)
            before = run[-1:]
        return sum(num_bytes), num_bytes[True]

    def _decoded_bytes(self, ids):
        return len(self._tokenizer.decode(ids).encode("utf-8"))

    def _end_document(self, end_counts=None):
        """end_counts: whether its end-of-document token counts; None: as the last id does."""
        if self._num_held > 0:
            self._write()
        if self._inside:
            core = self._open()
            if self.eos_id >= 0:
                core.append(np.array([self.eos_id]), np.array([self._last_counts if end_counts is None else end_counts]))
            core.end_document()
        self._held, self._inside = [], False

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        try:
            if kind is None and not self._finished:
                self.finish()
        finally:
            self._core = None


_PIECE = 1 << 20  # ids that are held at once
_IGNORED = -100  # in labels


def _row(name, values, kinds, expected):
    """values as an array (T) of one of these kinds of numbers."""
    try:
        array = values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)
    except (TypeError, ValueError) as error:  # bfloat16, or rows of several lengths
        raise ValueError(f"{name}: expected {expected} in one row (T), got {type(values).__name__} ({error})") from None
    if array.ndim != 1 or array.size > 0 and array.dtype.kind not in kinds:
        raise ValueError(f"{name}: expected {expected} in one row (T), got {array.dtype} of shape {array.shape}")
    return array


def _check_lengths(ids, mask, labels):
    if mask is not None and labels is not None:
        raise ValueError("mask and labels: both say which ids count in the loss; give one of them")
    for name, row in (("mask", mask), ("labels", labels)):
        if row is not None and len(row) != len(ids):
            raise ValueError(f"{name}: expected as many as there are ids, {len(ids)}, got {len(row)}")


def _tokens(ids, mask, labels, first=0):
    """ids (T) int64 and whether they count (T) bool. first: where in a stream they stand."""
    ids = _row("ids", ids, "iu", "integers").astype(np.int64, copy=False)
    mask = None if mask is None else _row("mask", mask, "biu", "bools, or integers 0 and 1,")
    labels = None if labels is None else _row("labels", labels, "iu", "integers").astype(np.int64, copy=False)
    _check_lengths(ids, mask, labels)
    if mask is not None:
        counted = mask.astype(bool)
        for at in np.flatnonzero(mask != counted)[:1]:
            raise ValueError(f"mask: expected 0 or 1, got {mask[at]} at position {first + at}")
        return ids, counted
    if labels is None:
        return ids, np.ones(len(ids), bool)
    counted = labels != _IGNORED
    for at in np.flatnonzero(counted & (labels != ids))[:1]:
        raise ValueError(f"labels: expected {ids[at]}, the id itself, or {_IGNORED} at position {first + at}, got "
                         f"{labels[at]}; they are not shifted, and zeros and ones are a mask")
    return ids, counted


def _runs(ids, counted):
    """Lists of neighbouring ids of which all count or none does, and which."""
    starts = np.flatnonzero(np.diff(counted)) + 1
    return [run.tolist() for run in np.split(ids, starts)], counted[np.concatenate(([0], starts))].tolist()
