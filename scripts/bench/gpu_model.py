"""Whole models: training tokens per second, model FLOP utilisation and decoding speed, beside the xlstm package.

    python scripts/bench/gpu_model.py [--sizes 125m,350m] [--variants 1-0,7-1] [--tokens-per-step 32768] [--out FOLDER]

Ours is the program xlstm-bench (the trainer's own step, CUDA graph included) on the configurations of configs/model; the
peer is the xlstm package's model of the same sizes in a bfloat16 autocast training step with torch's fused AdamW. Random
tokens, context 2048, medians; peers by events. MFU counts the model's operations (train/flops.h) against one large matrix
product measured in the same run. Writes gpu_model.json into FOLDER (default scripts/bench/results).

    --tiny   small models on the CPU: shows that the benchmark runs
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import peers  # noqa: E402
from timing import Effort, gpu_machine, measure, write_report  # noqa: E402

SIZES = {"125m": (768, 24), "350m": (1024, 48), "760m": (1536, 48), "1.3b": (2048, 48)}  # width, blocks


def run_ours(program, config, overrides, *options):
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run([program, config, *overrides, *options, "--json", report], capture_output=True, text=True)
        if done.returncode != 0:
            return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"}
        return json.loads(report.read_text()) | {"config": str(config.relative_to(ROOT))}


def time_peer(vocab, width, blocks, slstm_at, batch, seq_len, dtype, device, seconds):
    """The xlstm package's training step; {"error": why} where it cannot run here. Where the memory does not suffice, with the
    largest half, quarter ... of the batch for which it does."""
    try:
        torch.manual_seed(0)
        ids = torch.randint(vocab, (batch, seq_len), device=device)
        targets = torch.randint(vocab, (batch, seq_len), device=device)
        step = peers.xlstm_training_step(vocab, width, blocks, slstm_at, ids, targets)

        def run():
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                return step()

        # Without a graph: a recording that ends for want of memory leaves torch's random generators unusable.
        result = measure(lambda: [run], device, Effort(warm_up=3, samples=5, calls=1, seconds=seconds), graph=False)
        return {"batch": batch, "step_ms": result["median_ms"], "tokens_per_s": 1e3 * batch * seq_len / result["median_ms"],
                "method": result["method"], "extra_bytes": result["extra_bytes"]}
    except torch.OutOfMemoryError as error:
        short = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    except Exception as error:  # absent, no compiler for its own CUDA code: a peer is optional
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    free_memory()  # here, where the exception and with it what its frames hold are gone
    if batch == 1:
        return {"error": short}
    return time_peer(vocab, width, blocks, slstm_at, batch // 2, seq_len, dtype, device, seconds)


def free_memory():
    """Of this process, for other processes too."""
    gc.collect()
    torch.cuda.empty_cache()


def print_case(case):
    print(f"\n{case['case']}")
    for name in ("libxlstm", "xlstm"):
        entry = case[name]
        training = entry.get("training", entry)
        if "error" in entry:
            print(f"  {name:9} {entry['error']}")
            continue
        mfu = f"  MFU {100 * training['mfu']:.1f} %" if "mfu" in training else ""
        batch = f"  batch {training['batch']}" if training.get("batch", case["batch"]) != case["batch"] else ""
        decode = f"  decode {entry['decoding']['tokens_per_s']:.0f} tokens/s" if "decoding" in entry else ""
        print(f"  {name:9} {training['tokens_per_s']:12,.0f} tokens/s{mfu}{batch}{decode}")
    if case["ratio"] is not None:
        print(f"  ratio     {case['ratio']:.2f}x", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default="125m,350m", help="of " + ", ".join(SIZES))
    parser.add_argument("--variants", default="1-0,7-1", help="mLSTM to sLSTM blocks")
    parser.add_argument("--tokens-per-step", type=int, default=32768, help="sequences of 2048 in one micro batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--decode", type=int, default=128, help="tokens to decode at batch 1")
    parser.add_argument("--decode-dtype", default="float32", help="of the weights that decode: float32 or bfloat16_weights")
    parser.add_argument("--seconds", type=float, default=10, help="for each peer")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "bin" / "xlstm-bench")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if not args.program.exists():
        sys.exit(f"error: {args.program} is not there; build it (ninja -C build xlstm-bench) or give --program")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    dtype = "float32" if args.tiny else "bfloat16"
    seq_len = 64 if args.tiny else 2048
    batch = 2 if args.tiny else max(1, args.tokens_per_step // seq_len)
    vocab = 256 if args.tiny else 50304
    report = {"machine": gpu_machine(device), "peers": peers.versions(), "cases": []}
    cases = report["cases"]
    for size in args.sizes.split(","):
        for variant in args.variants.split(","):
            config = ROOT / "configs" / "model" / f"xlstm_{size}_{variant}.yaml"
            width, blocks = (32, 4) if args.tiny else SIZES[size]
            overrides = [f"data.seq_len={seq_len}", f"train.global_batch_size={batch}", f"train.dtype={dtype}",
                         "train.max_steps=100", f"run.device={device.type}"]
            if args.tiny:
                at = [1] if variant == "7-1" else []
                overrides += [f"model.embedding_dim={width}", f"model.num_blocks={blocks}", f"model.vocab_size={vocab}",
                              f"model.slstm_at={at}"]
            else:
                at = slstm_positions(config)
            ours = run_ours(args.program, config, overrides, "--steps", str(args.steps), "--tokens", str(args.decode),
                            "--dtype", args.decode_dtype)
            theirs = {"error": "left out"} if args.no_peers else time_peer(
                vocab, width, blocks, at, batch, seq_len, dtype, device, args.seconds)
            free_memory()
            both = "training" in ours and "tokens_per_s" in theirs
            ratio = ours["training"]["tokens_per_s"] / theirs["tokens_per_s"] if both else None
            cases.append({"case": f"xLSTM[{variant.replace('-', ':')}] {'tiny' if args.tiny else size}, batch {batch} x "
                                  f"{seq_len}, {dtype}", "batch": batch, "libxlstm": ours, "xlstm": theirs, "ratio": ratio})
            print_case(cases[-1])
            write_report(args.out / "gpu_model.json", report)
    print(f"\nwrote {args.out / 'gpu_model.json'}")
    return 1 if any("error" in case["libxlstm"] for case in cases) else 0


def slstm_positions(config):
    import yaml

    return yaml.safe_load(config.read_text())["model"].get("slstm_at", [])


if __name__ == "__main__":
    sys.exit(main())
