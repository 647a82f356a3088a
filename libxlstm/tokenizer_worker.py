"""Encodes and decodes text for the C++ programs, as their child process.

They hold the text of this file and run `python -c TEXT FILE...`, where FILE is a Hugging Face `tokenizer.json`, or a
vocabulary (JSON) and a merges file of a byte-level BPE (GPT-2). Needs the `tokenizers` package alone.

Every message, in both directions, is one frame: 1 byte kind, 8 bytes length (little-endian), payload.
The worker first sends "H" with JSON {"vocab_size", "eos_id", "bos_id"}; then it answers requests in order:

    "E"  u64 count, then per text u64 length + UTF-8   ->  "E"  count x u64 tokens, then all ids as i32
    "I"  the same for texts that go on in a document   ->  "I"  the same: nothing is put before them
    "D"  ids as i64                                    ->  "D"  UTF-8

A failure is answered by "X" with one line of text. It ends when its input does.
"""

import os
import sys

# Modules of the working folder or of the package must not shadow others of the same name.
if "__file__" not in globals():
    if sys.path[:1] == [""]:
        del sys.path[0]
elif sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import array
import functools
import json
import signal
import struct

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")

IMPORTED = "imported.json"  # what convert_hf.py keeps of a source besides model and tokenizer


class WorkerError(Exception):
    """Something to tell the program in one line."""


def load(files):
    try:
        import tokenizers
    except ImportError as error:
        raise WorkerError(
            f"{sys.executable} has no `tokenizers` package ({error}); install it with: "
            f"{sys.executable} -m pip install tokenizers, or name another Python by XLSTM_PYTHON"
        ) from error
    try:
        if len(files) == 1:
            tokenizer = tokenizers.Tokenizer.from_file(files[0])
        else:
            model = tokenizers.models.BPE.from_file(files[0], files[1])
            tokenizer = tokenizers.Tokenizer(model)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = tokenizers.decoders.ByteLevel()
            special = [token for token in END_OF_DOCUMENT if tokenizer.token_to_id(token) is not None]
            tokenizer.add_special_tokens(special)
    except Exception as error:  # the package raises bare Exception
        raise WorkerError(f"not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def bos_id(files):
    """The token that imported weights want before a prompt, which convert.py writes down beside their tokenizer; -1: none."""
    try:
        with open(os.path.join(os.path.dirname(files[0]), IMPORTED), encoding="utf-8") as file:
            token = json.load(file).get("bos_id")
    except FileNotFoundError:
        return -1
    except (OSError, ValueError, AttributeError) as error:
        raise WorkerError(f"{IMPORTED} beside it: {error}") from error
    return -1 if token is None else token


def hello(tokenizer, files):
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    end = [tokenizer.token_to_id(token) for token in END_OF_DOCUMENT]
    end = [token for token in end if token is not None]
    return json.dumps({"vocab_size": max(ids, default=-1) + 1, "eos_id": end[0] if end else -1,
                       "bos_id": bos_id(files)}).encode()


def without_prefix(part):
    """A normalizer or pre-tokenizer, as JSON, that puts no space before a text; None where it did nothing else."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        (name,) = (key for key in part if key != "type")
        return {**part, name: [kept for inner in part[name] if (kept := without_prefix(inner)) is not None]}
    never = {"prepend_scheme": "never", "add_prefix_space": False}  # of Metaspace, and of ByteLevel and the like
    return {key: never.get(key, value) for key, value in part.items()}


def for_inside(tokenizer):
    """The tokenizer for texts that go on in a document: the same where a prefix stands for the space before every word, since
    the words of a text are parted before they have it."""
    described = json.loads(tokenizer.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        described[name] = without_prefix(described[name])
    inside = type(tokenizer).from_str(json.dumps(described))

    def later_words(of):
        return [of.id_to_token(i) for i in of.encode("a b c", add_special_tokens=False).ids[1:]]

    return inside if later_words(inside) == later_words(tokenizer) else tokenizer


def encode(tokenizer, payload):
    (count,) = struct.unpack_from("<Q", payload)
    offset = 8
    texts = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", payload, offset)
        texts.append(str(payload[offset + 8 : offset + 8 + length], "utf-8"))
        offset += 8 + length
    encoded = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids = array.array("i")
    for one in encoded:
        ids.extend(one)
    return struct.pack(f"<{count}Q", *map(len, encoded)) + ids.tobytes()


def decode(tokenizer, payload):
    ids = array.array("q")
    ids.frombytes(payload)
    known = [i for i in ids if tokenizer.id_to_token(i) is not None] if all(i >= 0 for i in ids) else None
    if known is None:
        raise WorkerError("decode: a token id is negative")
    return tokenizer.decode(known, skip_special_tokens=False).encode("utf-8")


def read_exactly(stream, size):
    data = stream.read(size)
    return data if len(data) == size else None


def serve(files, source, sink):
    def send(kind, payload):
        sink.write(kind + struct.pack("<Q", len(payload)))
        sink.write(payload)
        sink.flush()

    def fail(error):
        send(b"X", " ".join(str(error).split()).encode("utf-8", "replace"))

    try:
        tokenizer = load(files)
        send(b"H", hello(tokenizer, files))
    except WorkerError as error:
        fail(error)
        return 1
    inside = functools.cache(lambda: for_inside(tokenizer))  # made where it is needed
    answers = {b"E": encode, b"I": lambda _, payload: encode(inside(), payload), b"D": decode}
    while (header := read_exactly(source, 9)) is not None:
        kind, (length,) = header[:1], struct.unpack("<Q", header[1:])
        payload = read_exactly(source, length)
        if payload is None:
            return 1
        try:
            if kind not in answers:
                raise WorkerError(f"unknown request {kind!r}")
            reply = answers[kind](tokenizer, memoryview(payload))
        except Exception as error:  # a bad text must not end the program without a word
            fail(error)
            continue
        send(kind, reply)
    return 0


def main():
    # Signals to the whole group are the program's to handle; this process is needed until its input ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the frames
    if len(sys.argv) not in (2, 3):
        print("usage: tokenizer_worker.py TOKENIZER_JSON | VOCAB_JSON MERGES_TXT", file=sys.stderr)
        return 2
    try:
        return serve(sys.argv[1:], source, sink)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without the exit of thread pools, which can hang when the program died
