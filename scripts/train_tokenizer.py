"""Learns a byte-level BPE tokenizer from text.

    python scripts/train_tokenizer.py python-stdlib --vocab-size 4096 --output NAME.json

INPUT is a file, a folder (all *.txt and *.py below it), or python-stdlib, the sources of this Python's standard library. The
result is a tokenizer.json for data.tokenizer; <|endoftext|> ends documents. Needs the tokenizers package.
"""

import argparse
import sys
import sysconfig
from pathlib import Path


def files_of(text):
    if text == "python-stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        packages = ("site-packages", "dist-packages")
        return sorted(p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in packages)
    path = Path(text)
    return sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".py")) if path.is_dir() else [path]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    files = [path for text in options.inputs for path in files_of(text)]
    if not files or not all(path.is_file() for path in files):
        sys.exit(f"error: no text in {', '.join(options.inputs)}")

    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=options.vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    texts = (path.read_bytes().decode("utf-8", errors="ignore") for path in files)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(options.output), pretty=False)
    print(f"{options.output}: {tokenizer.get_vocab_size()} tokens from {len(files)} files")


if __name__ == "__main__":
    main()
