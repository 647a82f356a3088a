"""Learns a byte-level BPE tokenizer from text.

    python scripts/train_tokenizer.py python-stdlib --vocab-size 4096 --output NAME.json
    python scripts/train_tokenizer.py 'corpus/*.jsonl.zst' --limit-bytes 1000000000 --vocab-size 32000 --output NAME.json

INPUT is what data.text and xlstm-data prepare take, and is read as they read it (xlstm-data show). The result is a
tokenizer.json for data.tokenizer; <|endoftext|> ends documents. Needs the tokenizers package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = "xlstm-data"
BUILT = Path(__file__).resolve().parents[1] / "build" / "bin"
LEAST = 257  # a token for each byte, and the end of a document
READ_BY = ("--glob", "--format", "--text-key", "--prompt-key", "--split-at", "--limit-bytes")  # options of xlstm-data show
SECONDS = 5  # between two lines of progress


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help=f"at least {LEAST} (default: 4096)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="tokenizer.json that is written")
    for option in READ_BY:
        parser.add_argument(option, help=f"as {PROGRAM} show has it (its --help)")
    parser.add_argument("--bin", type=Path, metavar="DIR", help=f"folder of {PROGRAM} (default: build/bin, else PATH)")
    options = parser.parse_args()
    if options.vocab_size < LEAST:
        parser.error(f"--vocab-size is {options.vocab_size}, expected at least {LEAST}: 256 bytes and the end of document")
    return options


def check_output(path):
    """Before the work, not behind it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --output {path}: cannot make its folder: {error.strerror}; choose another")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        sys.exit(f"error: --output {path}: " + ("is a folder; name a file" if path.is_dir() else
                                                "its folder cannot be written; choose another"))


def find_program(folder):
    program = folder / PROGRAM if folder else BUILT / PROGRAM if (BUILT / PROGRAM).exists() else shutil.which(PROGRAM)
    if program is None or not Path(program).exists():
        sys.exit(f"error: {PROGRAM} is not in {folder or BUILT}; build it (./scripts/train.sh), or say where it is by --bin")
    return program


class Documents:
    """The texts of the inputs, one after the other, and how many there were."""

    def __init__(self, options):
        self.command = [find_program(options.bin), "show", *options.inputs]
        for option in READ_BY:
            value = getattr(options, option[2:].replace("-", "_"))
            if value is not None:
                self.command.append(f"{option}={value}")
        self.count = self.bytes = 0

    def __iter__(self):
        told = time.monotonic()
        environment = {"XLSTM_PYTHON": sys.executable, **os.environ}
        with subprocess.Popen(self.command, stdout=subprocess.PIPE, env=environment) as process:
            for line in process.stdout:
                self.count += 1
                self.bytes += len(line)
                document = json.loads(line)  # a text, or a list of segments
                yield from [document] if isinstance(document, str) else [segment["text"] for segment in document]
                if time.monotonic() - told > SECONDS:
                    told = time.monotonic()
                    print(f"read {self}", file=sys.stderr)
        if process.returncode != 0:  # which it has told
            sys.exit(process.returncode)
        if self.count == 0:
            sys.exit("error: no text in the inputs; give other or more text")
        print(f"read {self}; merging its words", file=sys.stderr)

    def __str__(self):
        return f"{self.bytes / 1e6:.1f} MB, {self.count} documents"


def main():
    options = parse_options()
    check_output(options.output)
    documents = Documents(options)

    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=options.vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(options.output), pretty=False)
    print(f"{options.output}: {tokenizer.get_vocab_size()} tokens from {documents}")


if __name__ == "__main__":
    main()
