"""A small training run for tests: its text, its configuration, and the programs that work on it."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("XLSTM_BIN", ROOT / "build" / "bin"))  # programs of another build
STEPS = 300 if os.environ.get("XLSTM_FAULTS") == "full" else 160
SAVE_EVERY = 10

CONFIG = """\
run: {{name: tiny, out_dir: {out_dir}, seed: 7, device: cpu, num_threads: 1}}
model: {{vocab_size: 256, embedding_dim: 32, num_blocks: 2, num_heads: 2, slstm_at: [1], dropout: 0.1}}
data: {{text: {text}, cache_dir: {cache_dir}, tokenizer: bytes, seq_len: 32}}
train: {{global_batch_size: 4, micro_batch_size: 2, max_steps: {steps}}}
optim: {{learning_rate: 1e-2, min_lr: 1e-3, warmup_steps: {warmup}}}
ckpt: {{every: {every}, keep_last: 3}}
eval: {{every: 50, batches: 2}}
sample: {{every: 50, prompts: ["the "], max_new_tokens: 8}}
log: {{every: 1, console: plain, tensorboard: false, plot: false}}
"""


def write_text(path, num_bytes=60_000, seed=1):
    """Words in a fixed order of chance: enough structure for a loss that falls."""
    rng = random.Random(seed)
    words = ["the", "cell", "gate", "state", "keeps", "forgets", "writes", "reads", "memory", "slowly", "and", "then"]
    text = ""
    while len(text) < num_bytes:
        text += " ".join(rng.choice(words) for _ in range(rng.randint(4, 9))).capitalize() + ".\n"
    path.write_text(text)
    return path


def environment(**extra):
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLSTM_FAILPOINT")}
    return {**env, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def program(name, *args, check=None, timeout=300, stdin=None, **env):
    """Runs build/bin/<name> to its end. check: the exit status that is expected."""
    done = subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True, timeout=timeout,
                          input=stdin if stdin is not None else "", env=environment(**env))
    if check is not None:
        assert done.returncode == check, f"{name} {args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class TinyRun:
    """One run folder below `folder`; runs that share `shared` (text and token cache) see the same data."""

    def __init__(self, folder, shared, steps=STEPS, every=SAVE_EVERY):
        self.folder, self.steps = Path(folder), steps
        self.folder.mkdir(parents=True, exist_ok=True)
        Path(shared).mkdir(parents=True, exist_ok=True)
        text = Path(shared) / "text.txt"
        if not text.exists():
            write_text(text)
        self.path = self.folder / "tiny"
        self.config = self.folder / "config.yaml"
        self.config.write_text(CONFIG.format(out_dir=self.folder, text=text, cache_dir=Path(shared) / "cache",
                                             steps=steps, warmup=min(10, steps // 2), every=every))

    def train(self, *overrides, check=None, **env):
        return program("xlstm-train", self.config, *overrides, check=check, **env)

    def start(self, *overrides, **env):
        """The trainer in the background, its output in <folder>/output.txt."""
        with open(self.folder / "output.txt", "ab") as output:
            return subprocess.Popen([BIN / "xlstm-train", self.config, *overrides], stdout=output, stderr=output,
                                    stdin=subprocess.DEVNULL, env=environment(**env))

    def output(self):
        return (self.folder / "output.txt").read_text(errors="replace")

    def checkpoints(self):
        return sorted(p.parent for p in self.path.glob("ckpt/step-*/MANIFEST.json"))

    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def last_step(self):
        """The newest step in the metrics, 0 before the first."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return 0
        steps = [json.loads(line)["step"] for line in lines[:-1] if b"train/loss" in line]
        return max(steps, default=0)

    def wait_for_step(self, process, step, timeout=120):
        end = time.time() + timeout
        while self.last_step() < step:
            assert process.poll() is None, f"ended early with {process.returncode}:\n{self.output()}"
            assert time.time() < end, f"step {step} not reached in {timeout} s"
            time.sleep(0.005)

    def interrupt(self, step, *overrides):
        """Trains until `step` is done and asks to stop: status 75."""
        process = self.start(*overrides)
        try:
            self.wait_for_step(process, step)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 75
        finally:
            stop(process)

    def losses(self):
        """(step, exact loss) of every training line, in file order: duplicates and gaps would show."""
        return [(m["step"], m["train/loss_hex"]) for m in self.metrics() if "train/loss_hex" in m]

    def fingerprint(self):
        """All that must be equal for two runs to be the same: weights, optimizer, trainer state, and every loss."""
        last = self.path / "ckpt" / f"step-{self.steps:08d}"
        names = ["model.safetensors", "optim-rank00000.safetensors", "trainer.json"]
        return {**{name: sha256(last / name) for name in names}, "losses": self.losses()}


def stop(process):
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
