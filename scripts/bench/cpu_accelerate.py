"""Models of today's packages on the CPU, as they are and after libxlstm.accelerate(), in one run.

    python scripts/bench/cpu_accelerate.py [--seconds N] [--only transformers,native,large,small] [--out FOLDER] [--name NAME]

float32, forward and backward of a batch and a token of decoding, median over rounds in which both take turns. transformers is
measured with the xlstm package's code, which it takes where that is installed, and with its own (native), both with the kernels
that run without a GPU. Writes NAME.json (default cpu_accelerate) into FOLDER (default scripts/bench/results).
"""

import argparse
import copy
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import peers  # noqa: E402
from timing import machine, race, write_report  # noqa: E402

import libxlstm  # noqa: E402

VOCAB, BLOCKS = 256, 4
SHAPES = [(256, 1, 256), (256, 4, 512), (512, 1, 1024)]  # embedding_dim, B, T
KERNELS = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
           "step_kernel": "native", "autocast_kernel_dtype": "float32"}


class Transformers:
    name = "transformers xLSTMForCausalLM"

    def make(self, dim, time):
        import transformers

        config = transformers.xLSTMConfig(vocab_size=VOCAB, hidden_size=dim, num_hidden_layers=BLOCKS, num_heads=4, **KERNELS)
        return transformers.xLSTMForCausalLM(config)

    def logits(self, model, ids):
        return model(ids, use_cache=False).logits

    def decoder(self, model, ids):
        cache = model(ids, use_cache=True).cache_params
        return lambda: model(ids[:, -1:], cache_params=cache, use_cache=True)


class Native(Transformers):
    name = "transformers xLSTMForCausalLM without the xlstm package"

    def make(self, dim, time):
        import transformers.utils

        transformers.utils.is_xlstm_available = lambda: False
        return super().make(dim, time)


class Large:
    name = "xlstm xLSTMLarge"

    def make(self, dim, time):
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

        config = xLSTMLargeConfig(vocab_size=VOCAB, embedding_dim=dim, num_blocks=BLOCKS, num_heads=4, mode="inference",
                                  return_last_states=True, **KERNELS)
        return xLSTMLarge(config)

    def logits(self, model, ids):
        return model(ids)[0]

    def decoder(self, model, ids):
        state = model(ids)[1]
        return lambda: model(ids[:, -1:], state)


class Small:
    name = "xlstm xLSTMLMModel[3:1]"

    def make(self, dim, time):
        return peers.xlstm_model(VOCAB, dim, BLOCKS, [1], time, torch.device("cpu"))

    def logits(self, model, ids):
        return model(ids)

    def decoder(self, model, ids):
        state = model.step(ids[:, -1:])[1]
        return lambda: model.step(ids[:, -1:], state)


def training(case, model, ids):
    def run():
        model.zero_grad()
        torch.nn.functional.cross_entropy(case.logits(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()

    return run


def decoding(case, model, ids):
    model = copy.deepcopy(model).eval()
    with torch.inference_mode():
        step = case.decoder(model, ids[:1, :-1])
    return torch.inference_mode()(step)


CASES = {"transformers": Transformers(), "native": Native(), "large": Large(), "small": Small()}


def measure(name, dim, batch, time, seconds):
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    case = CASES[name]
    theirs = case.make(dim, time)
    ours = libxlstm.accelerate(copy.deepcopy(theirs))
    ids = torch.randint(VOCAB, (batch, time + 1))
    results = []
    for kind, make in ((f"forward and backward, B={batch} T={time}", training), ("a token, B=1", decoding)):
        before = os.getloadavg()[0]
        times = race({"accelerated": make(case, ours, ids), "untouched": make(case, theirs, ids)}, seconds)
        result = {"case": f"{case.name}, d={dim} blocks={BLOCKS}, {kind}", "times": times,
                  "ratio": times["untouched"]["median_ms"] / times["accelerated"]["median_ms"],
                  "load": [before, os.getloadavg()[0]]}
        before_ms, after_ms = (times[name]["median_ms"] for name in ("untouched", "accelerated"))
        print(f"{result['ratio']:6.2f}x  {before_ms:9.2f} -> {after_ms:8.2f} ms  {result['case']}  (load {before:.1f})",
              flush=True)
        results.append(result)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="time per case (at least 5 rounds)")
    parser.add_argument("--only", default=",".join(CASES), help=f"comma list of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results")
    parser.add_argument("--name", default="cpu_accelerate", help="name of the file written")
    args = parser.parse_args()
    report = {"machine": machine(), "peers": peers.versions(), "cases": []}
    # A process each: transformers decides once for or against the code of the xlstm package.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in args.only.split(","):
            for shape in SHAPES:
                report["cases"] += pool.apply(measure, (name, *shape, args.seconds))
                write_report(args.out / f"{args.name}.json", report)


if __name__ == "__main__":
    main()
