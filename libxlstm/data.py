"""Token files, read by training loops of one's own."""

import itertools
import operator
import os

import torch

from .arguments import integer
from .library import load_module


class TokenData:
    """Sequences of prepared token files (xlstm-data prepare), in the order in which xlstm-train visits them.

    prefixes: one prefix of .bin/.idx or several, of which each gives samples in proportion to its weight (all alike), as
    data.train has them. seq_len, seed, shuffle, reset_state_at_document, mask_loss_across_documents: as data.seq_len,
    data.shuffle_seed and the others of these names. streams: samples i, i + streams, i + 2 streams, ... go on in one
    another, as with train.carry_state, for batches of that size and model(ids, state, targets=targets); 0: each is
    from anywhere.

    A sample is a window of seq_len tokens with those that follow as targets, of which prompts do not count. Windows overlap by
    the one token, every epoch visits each once, and sample i is the same whenever and in whatever batch it is read: step s of a
    run with train.global_batch_size B reads batch(s * B, B). Nothing is read before it is asked for. It is a map-style dataset
    for torch.utils.data.DataLoader, too, whose workers open the files anew, as every pickle and copy does.

    Raises libxlstm.Error naming the file or the setting that is wrong.
    """

    def __init__(self, prefixes, seq_len, seed=1234, shuffle=True, weights=None, streams=0, reset_state_at_document=True,
                 mask_loss_across_documents=True):
        prefixes = [prefixes] if isinstance(prefixes, (str, os.PathLike)) else prefixes
        prefixes = [os.fspath(prefix) for prefix in prefixes]
        weights = [1.0] * len(prefixes) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(prefixes):
            raise ValueError(f"weights: expected one for each of the {len(prefixes)} token files, got {len(weights)}")
        integer("seq_len", seq_len), integer("seed", seed, 0, 2**64 - 1), integer("streams", streams)
        self.prefixes, self.seq_len = prefixes, seq_len
        self._arguments = (prefixes, weights, seq_len, seed, bool(shuffle), streams, bool(reset_state_at_document),
                           bool(mask_loss_across_documents))
        self._core = load_module().TokenData(*self._arguments)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_core"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._core = load_module().TokenData(*self._arguments)

    def __len__(self):
        """Samples of one pass over all files."""
        return self._core.samples_per_epoch

    def __getitem__(self, sample):
        """ids, targets and reset of one sample, each (seq_len), as batch() has them; negative ones count from the end."""
        index = operator.index(sample)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample: expected one from {-len(self)} to {len(self) - 1}, got {index}")
        ids, targets, reset = self.batch(index % len(self), 1)
        return ids[0], targets[0], reset[0]

    @property
    def num_tokens(self):
        """Tokens of all files."""
        return self._core.num_tokens

    @property
    def num_counted_tokens(self):
        """Of them, those that count in the loss: not the prompts (xlstm-data prepare --prompt-key)."""
        return self._core.num_counted_tokens

    @property
    def vocab_size(self):
        """What model.vocab_size must be at least; None where a file does not tell (it has no .meta.json)."""
        return self._core.vocab_size

    def batch(self, first_sample, count):
        """ids (count, seq_len) int64, targets (count, seq_len) int64, -100 where none counts, and reset (count, seq_len) bool,
        True where a sample or a document begins: what model.loss(ids, targets, reset=reset) takes. On the CPU. Samples from
        len(self) on are those of further epochs.
        """
        return self._core.batch(integer("first_sample", first_sample), integer("count", count))

    def batches(self, batch_size, first=0, steps=None):
        """batch(first, batch_size), the next one, ..., epoch after epoch: `steps` of them, or (None) without end."""
        for step in itertools.count() if steps is None else range(steps):
            yield self.batch(first + step * batch_size, batch_size)

    def __repr__(self):
        return f"TokenData({self.prefixes}, seq_len={self.seq_len}: {len(self)} samples per epoch)"
