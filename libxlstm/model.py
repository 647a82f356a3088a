"""The C++ models as torch.nn.Module."""

import collections.abc
import contextlib
import copy
import json
import numbers
import os
import tempfile

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .arguments import integer, number
from .core_module import CoreModule, check_state
from .library import as_yaml, load_module


class BlockStack(CoreModule):
    """The blocks of an xLSTM, for networks of your own: vectors in, vectors out, as torch.nn.LSTM(batch_first=True) has it.

        stack = libxlstm.BlockStack(embedding_dim=128, num_blocks=4, slstm_at=[1], mlstm={"proj_factor": 1.5})
        y, state = stack(x)                              # x (B,T,128) -> y (B,T,128)
        y, state = stack(more, state)                    # goes on from there

    settings: those of `model` in a configuration, but those of embedding and head: `xlstm-train --help` lists them with their
    defaults. Blocks are residual and a norm follows the last (add_out_norm=False: none); positions that gpt learns and the norm
    in front of rwkv4 to rwkv6 belong to the embedding. First weights are torch's random generator's (torch.manual_seed),
    float32 and on the CPU whatever torch.set_default_dtype and torch.device say ("meta" is an error); to() moves them. Raises
    libxlstm.Error naming the setting that is wrong.
    """

    _ELSEWHERE = ("vocab_size", "input_features", "tie_weights", "embedding_init_std", "output_logit_soft_cap",
                  "add_embedding_dropout", "max_positions")

    def __init__(self, **settings):
        for name in self._ELSEWHERE:
            if name in settings:
                raise TypeError(f"{name}: a setting of embedding or head, which a stack of blocks does not have")
        settings = json.loads(as_yaml(settings))  # plain values
        super().__init__(load_module().make_stack(as_yaml({"model": settings})))
        self._settings = settings

    def forward(self, x, state=None, reset=None, lengths=None, blocks=None):
        """x (B,T,D) floating, T >= 0 -> y (B,T,D) and the state after the last token: one list of tensors per block, new ones.

        state None: before the first token. reset (B,T) bool: the state is empty before that token. lengths, a list or tensor
        of B numbers from 1 to T: the sequences have these lengths and padding behind them, which is not read; y is 0 there, and
        the state is the one behind each sequence's own end. With a state there is a pass for each length that occurs, and a
        sequence may have nothing new: its length is 0 and its state stays (kinds whose state grows, llama, gpt and hyena, take
        one length for all then).

        Gradients go back through the state, too; to cut them, as truncated backpropagation through time does, pass on
        libxlstm.detach(state).

        blocks, positions as Python counts them: a list of the residual stream (B,T,D) behind each of these blocks, before
        the last norm, comes third: y, state, (first, last) = stack(x, blocks=[0, -1]).

        x may be a torch.nn.utils.rnn.PackedSequence, which brings its lengths: so is y then, and the state is in the order of
        the sequences before they were packed, as that of torch.nn.LSTM is. reset and blocks are not taken beside it.
        """
        if isinstance(x, PackedSequence):
            return self._packed(x, state, reset, lengths, blocks)
        self._check_dtype("x", x, "blocks")
        return self._call_with_blocks(self._core, blocks, x, state, reset, lengths)

    def _packed(self, x, state, *others):
        if any(other is not None for other in others):
            raise TypeError("x: a PackedSequence has its own lengths and takes neither lengths nor reset nor blocks; "
                            "torch.nn.utils.rnn.pad_packed_sequence(x, batch_first=True) gives x and lengths")
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        y, state = BlockStack.forward(self, padded, state, lengths=lengths)
        if x.sorted_indices is not None:  # in which they lie in x
            y, lengths = y[x.sorted_indices], lengths[x.sorted_indices.cpu()]
        return x._replace(data=pack_padded_sequence(y, lengths, batch_first=True).data), state

    @property
    def settings(self):
        """What it was made of: BlockStack(**stack.settings) is another one like it. A dictionary."""
        return copy.deepcopy(self._settings)


class Model(CoreModule):
    """A language model of the library; load() and make_model() give one."""

    _tokenizer = None

    def forward(self, ids, state=None, reset=None, lengths=None, targets=None, reduction="mean"):
        """ids (B,T) int64, T >= 0 -> logits (B,T,V) float32 and the state after the last token, one list of tensors per
        block. state None: before the first token. reset (B,T) bool: the state is empty before that token. lengths (B): see
        BlockStack.forward. A model of numbers (model.input_features) takes (B,T,F).

        With targets (B,T) the loss stands in place of the logits, which are then never held all at once: see loss(). That is
        how a model in DistributedDataParallel is trained, and how truncated backpropagation through time goes:

            state = None
            for ids, targets in pieces:                  # each goes on where the one before ended
                loss, state = model(ids, state, targets=targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                state = libxlstm.detach(state)           # gradients end here
        """
        return self._call(self._core, ids, state, reset, lengths, targets, reduction)

    def loss(self, ids, targets, reset=None, reduction="mean"):
        """Cross entropy in nats of the model's predictions; never holds all logits. Differentiable.

        ids, targets (B,T) int64: targets[b,t] is the token that follows ids[b,t], so both are slices of one (B,T+1) tensor,
        x[:, :-1] and x[:, 1:]; nothing is shifted here. Targets of -100 do not count. reset (B,T) bool: the state is empty
        before that token. reduction "mean": over the targets that count, a scalar (0 where none does); "sum": their sum;
        "none": (B,T), 0 where a target does not count. A model of numbers (model.input_features with vocab_size 1) takes ids
        (B,T,F) and targets (B,T), both float, and gives squared errors; targets of NaN do not count.

        Hooks and DistributedDataParallel do not see this call; they see model(ids, targets=targets)[0], which is the same and
        holds the states meanwhile.
        """
        return self._call(lambda ids, _, reset, __: self._core.loss(ids, targets, reset, reduction), ids, None, reset, None)

    def hidden(self, ids=None, state=None, reset=None, lengths=None, embeddings=None, blocks=None):
        """The vectors (B,T,D) behind the last norm, which the head reads, and the state: for heads, probes and losses of your
        own; logits(y) goes on from there. Of ids (B,T), or of embeddings (B,T,D) in place of embed(ids): prompts that are
        learned, or vectors from elsewhere. The rest as in forward().

        blocks, positions as Python counts them: a list of the residual stream (B,T,D) behind each of these blocks comes third,

            y, state, (first, last) = model.hidden(ids, blocks=[0, -1])
        """
        if (ids is None) == (embeddings is None):
            raise TypeError("hidden: expected either ids or embeddings")
        inputs, embedded = (ids, False) if embeddings is None else (embeddings, True)
        self._check_dtype("embeddings", embeddings, "blocks")
        return self._call_with_blocks(
            lambda *given: self._core.hidden(embedded, *given), blocks, inputs, state, reset, lengths)

    def embed(self, ids):
        """ids (B,T) -> (B,T,D): what hidden() takes as embeddings."""
        return self._call(lambda ids, *_: self._core.embed(ids), ids, None, None, None)

    def logits(self, hidden):
        """hidden (...,D) -> (...,V), float32 or float64."""
        self._check_dtype("hidden", hidden, "lm_head" if "lm_head" in self._modules else "embedding")
        return self._call(lambda hidden, *_: self._core.logits(hidden), hidden, None, None, None)

    def _call(self, function, inputs, *rest):
        try:
            return super()._call(function, inputs, *rest)
        except IndexError:
            if "embedding" not in self._modules:
                raise
            ids, count = torch.as_tensor(inputs), self.embedding.weight.shape[0]
            outside = ids[(ids < 0) | (ids >= count)]
            if outside.numel() == 0:
                raise
            raise IndexError(f"ids: expected ids from 0 to {count - 1}, got {outside[0]}, which is out of range") from None

    def generate(self, prompt, max_new_tokens=256, temperature=0.8, top_k=0, top_p=1.0, seed=42, stop_token=None,
                 vocab_size=None, on_token=None, state=None, return_state=False):
        """The ids that continue a prompt, a list or a tensor (T) of at least one id, such as self.tokenizer.encode_prompt(text)
        gives, as a list; or lists that continue each of several prompts of any lengths, a list of such or a tensor (B,T), side
        by side. Drawn as xlstm-generate draws: in constant time and memory per token, without dropout, the same for the same
        seed on every platform. Side by side rounds otherwise than one by one, which in bfloat16 and with weights of 8 bits may
        let texts part.

        temperature 0: greedy. top_k: from so many of the likeliest, 0 or None: all; top_p: from the likeliest that hold this
        probability, None: all. seed: prompt i has seed + i. stop_token: the end, which is the last id then; -1: none.
        vocab_size: only ids below it, where the model's vocabulary is padded. Where these two are not given they are those of
        self.tokenizer, if there is one. on_token(id), of several prompts on_token(i, id), is called with each id at once.

        state: the prompts, one for each of its sequences, go on from there, as those of model(ids, state) do: nothing before
        them is read again. return_state: ids, state come back, and the state is behind prompt and ids, all of them, as if
        model(prompt + ids) had given it; with max_new_tokens=0 behind the prompt. So goes a chat:

            state = None
            for turn in turns:                           # what is new alone: at least one id
                ids, state = model.generate(turn, state=state, return_state=True)

        The ids are those that the whole text as a prompt would give, up to rounding. Not of models whose state grows with what
        they have read (llama, gpt, hyena).

        Raises libxlstm.Error, or ValueError where an argument is not of its kind.
        """
        self._check_parameters()
        prompt = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        if isinstance(prompt, str) or not isinstance(prompt, collections.abc.Iterable):
            _ids(prompt)  # says what is wrong
        prompts = list(prompt)
        several = any(not isinstance(ids, numbers.Integral) for ids in prompts)
        prompts = [_ids(ids) for ids in (prompts if several else [prompts])]
        if not several and on_token is not None:
            told, on_token = on_token, lambda _, id: told(id)
        integer("max_new_tokens", max_new_tokens, 0), integer("seed", seed, 0, 2**64 - 1)
        for name, value, low in (("vocab_size", vocab_size, 1), ("stop_token", stop_token, -1)):
            if value is not None:
                integer(name, value, low)
        temperature = number("temperature", temperature)
        top_k = 0 if top_k is None else integer("top_k", top_k)
        top_p = 1.0 if top_p is None else number("top_p", top_p)
        if None in (stop_token, vocab_size) and self.tokenizer is not None:
            stop_token = self.tokenizer.eos_id if stop_token is None else stop_token
            vocab_size = self.tokenizer.vocab_size if vocab_size is None else vocab_size
        stop_token, vocab_size = -1 if stop_token is None else stop_token, vocab_size or 0
        check_state(state)
        if state is None and return_state:
            state = []
        with self._own_stream():
            found, state = self._core.generate(prompts, max_new_tokens, temperature, top_k, top_p, seed, stop_token, vocab_size,
                                               on_token, state)
        for tensor in (tensor for block in state or () for tensor in block):
            if tensor.is_cuda:  # made on the stream above, used on the caller's
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        found = found if several else found[0]
        return (found, state) if return_state else found

    def merge_lora(self):
        """A new Model without adapters that computes the same: they are part of its weights. All its parameters are trained.
        What a subclass has besides is not in it."""
        self._check_parameters()
        if not any(name.endswith("lora_a") for name, *_ in self._own):
            raise ValueError("merge_lora: the model has no adapters (model.lora.rank)")
        merged = Model(self._core.merge_lora())
        merged._tokenizer = self._tokenizer
        return merged.train(self.training)

    def save(self, folder):
        """Writes a checkpoint folder for load() and the programs, tokenizer included. float64 is rounded to float32. A model that
        is there is kept until the new one is whole, which takes its place in one step where the file system can exchange names."""
        self._check_parameters()
        with self._tokenizer_files() as tokenizer:
            self._core.save(str(folder), tokenizer)

    @contextlib.contextmanager
    def _tokenizer_files(self):
        """Where they are: those of a model that came as a pickle may not be where they were."""
        *_, spec = self._core.settings()
        if self._tokenizer is None or self._tokenizer.spec == "bytes" or os.path.exists(spec):
            yield spec
            return
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save(os.path.join(folder, "tokenizer.json"))
            for name, content in self._tokenizer.companions.items():
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(content)
            yield folder

    def __reduce_ex__(self, protocol):
        with contextlib.suppress(ValueError):  # where it cannot be read, it cannot by the copy, which says why
            _ = self.tokenizer  # is kept, since its files may be out of the copy's reach
        return super().__reduce_ex__(protocol)

    @property
    def tokenizer(self):
        """libxlstm.scoring.Tokenizer of the text that the model was trained with, for encode() and decode(); None for a fresh
        model that was not given one, and for models of tasks."""
        if self._tokenizer is None and self._core.tokenizer:
            from .scoring import Tokenizer

            self._tokenizer = Tokenizer(self._core.tokenizer)
        return self._tokenizer

    @property
    def settings(self):
        """Every setting of the run that made the model, as YAML, which make_model() takes."""
        return self._core.config

    @property
    def folder(self):
        """The checkpoint folder, "" for a fresh model."""
        return self._core.folder

    @contextlib.contextmanager
    def _own_stream(self):
        """On a GPU, a stream where decoding steps can be recorded, which the default one does not allow."""
        device = next(self.parameters()).device
        if device.type != "cuda":
            yield
            return
        stream, callers = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(callers)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            callers.wait_stream(stream)


def _ids(sequence):
    """One sequence as a list of integers."""
    if isinstance(sequence, str):
        raise ValueError("prompt: expected ids, got text; model.tokenizer.encode_prompt(text) gives them")
    ids = torch.as_tensor(sequence, device="cpu")
    if ids.dim() != 1 or ids.numel() > 0 and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"prompt: expected ids (T), or several such, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.tolist()
