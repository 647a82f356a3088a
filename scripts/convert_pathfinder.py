#!/usr/bin/env python3
"""Pathfinder of the Long Range Arena as the files that data.task pathfinder reads.

python scripts/convert_pathfinder.py lra_release/pathfinder32 data/lra/pathfinder32

Reads the PNG files of curv_contour_length_14 (--level names another) that its metadata names, and writes train.npz,
validation.npz and test.npz with `images`, uint8 (N, height, width), and `labels`, 0 or 1: 80, 10 and 10 % of them, in an
order drawn from --seed. Files without content, of which the release has one, are left out. Needs numpy and Pillow.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def samples(folder):
    """(path of the image, label) of all metadata files, in the order of their numbers."""
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: int(path.stem))
    if not files:
        sys.exit(f"{folder / 'metadata'}: no .npy files there; give the folder pathfinder32 of lra_release.gz")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():  # text, in spite of the name
            where, name, _, label = line.split()[:4]
            if label not in ("0", "1"):
                sys.exit(f"{file}: label {label} of {name}, expected 0 or 1")
            path = folder / where / name
            if not path.exists():
                sys.exit(f"{path}: no such file, but {file} names it")
            if path.stat().st_size > 0:
                yield path, int(label)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder pathfinder32 of lra_release.gz")
    parser.add_argument("output", type=Path, help="folder to write into")
    parser.add_argument("--level", default="curv_contour_length_14")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    found = list(samples(arguments.source / arguments.level))
    order = np.random.RandomState(arguments.seed).permutation(len(found))  # whose numbers numpy never changes
    images = np.stack([np.asarray(Image.open(path).convert("L")) for path, _ in found])[order]
    labels = np.array([label for _, label in found], dtype=np.uint8)[order]
    arguments.output.mkdir(parents=True, exist_ok=True)
    first = 0
    for part, share in PARTS.items():
        last = len(found) if part == "test" else first + round(share * len(found))
        np.savez(arguments.output / f"{part}.npz", images=images[first:last], labels=labels[first:last])
        print(f"{arguments.output / part}.npz: {last - first} images")
        first = last


if __name__ == "__main__":
    main()
