#!/usr/bin/env python3
"""Pathfinder of the Long Range Arena as the files that data.task pathfinder reads.

python scripts/convert_pathfinder.py lra_release/pathfinder32 data/lra/pathfinder32

Reads the PNG files of curv_contour_length_14 (--level names another) that its metadata names, and writes train_images.npy,
uint8 (N, height, width), and train_labels.npy, 0 or 1, and the same of validation and test: 80, 10 and 10 % of them, in an
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
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):  # text, in spite of the name
            columns = line.split()
            if len(columns) < 4:
                sys.exit(f"{file}: line {number} has {len(columns)} columns, expected folder, name, number and label at least")
            where, name, _, label = columns[:4]
            if label not in ("0", "1"):
                sys.exit(f"{file}: label {label} of {name}, expected 0 or 1")
            path = folder / where / name
            if not path.exists():
                sys.exit(f"{path}: no such file, but {file} names it")
            if path.stat().st_size > 0:
                yield path, int(label)


def pixels(path):
    """Grey, uint8 (height, width)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises at files that are cut or spoilt
        sys.exit(f"{path}: not a whole image ({error}); unpack the release again")


def stacked(paths):
    """(N, height, width) of images of one size."""
    images = []
    for path in paths:
        images.append(pixels(path))
        if images[-1].shape != images[0].shape:
            sys.exit(f"{path}: {size_of(images[-1])} pixels, but {paths[0]} has {size_of(images[0])}; expected one size")
    return np.stack(images)


def size_of(image):
    return f"{image.shape[1]} x {image.shape[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder pathfinder32 of lra_release.gz")
    parser.add_argument("output", type=Path, help="folder to write into")
    parser.add_argument("--level", default="curv_contour_length_14")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    for part in PARTS:
        if (arguments.output / f"{part}.npz").exists():
            sys.exit(f"{arguments.output / part}.npz: would be read instead of what is written now; remove it")
    found = list(samples(arguments.source / arguments.level))
    if not found:
        sys.exit(f"{arguments.source / arguments.level}: the metadata names no image that has content")
    order = np.random.RandomState(arguments.seed).permutation(len(found))  # whose numbers numpy never changes
    images = stacked([path for path, _ in found])[order]
    labels = np.array([label for _, label in found], dtype=np.uint8)[order]
    arguments.output.mkdir(parents=True, exist_ok=True)
    first = 0
    for part, share in PARTS.items():
        last = len(found) if part == "test" else first + round(share * len(found))
        for name, array in (("images", images), ("labels", labels)):
            np.save(arguments.output / f"{part}_{name}.npy", array[first:last])
        print(f"{arguments.output / part}_images.npy: {last - first} images")
        first = last


if __name__ == "__main__":
    main()
