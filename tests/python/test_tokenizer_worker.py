"""libxlstm/tokenizer_worker.py from outside: the frames that csrc/data/tokenizer_process.cpp exchanges with it."""

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parents[2] / "libxlstm" / "tokenizer_worker.py"


def worker(*args, stdin=b""):
    return subprocess.run([sys.executable, WORKER, *map(str, args)], input=stdin, capture_output=True, timeout=60)


def frames(data):
    result = []
    while data:
        (length,) = struct.unpack("<Q", data[1:9])
        result.append((data[:1], data[9:9 + length]))
        data = data[9 + length:]
    return result


def test_worker_protocol(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "</s>": 9}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))

    def request(kind, payload):
        return kind + struct.pack("<Q", len(payload)) + payload

    encode = struct.pack("<Q", 2) + struct.pack("<Q", 3) + b"a b" + struct.pack("<Q", 0)
    done = worker(tmp_path / "t.json", stdin=request(b"E", encode) + request(b"D", struct.pack("<2q", 1, 9))
                  + request(b"Q", b"") + request(b"E", struct.pack("<QQ", 1, 1) + b"a"))
    assert done.returncode == 0 and done.stderr == b""
    hello, first, second, third, fourth = frames(done.stdout)
    assert hello[0] == b"H" and json.loads(hello[1]) == {"vocab_size": 10, "eos_id": 9, "bos_id": -1}
    assert first == (b"E", struct.pack("<2Q", 2, 0) + struct.pack("<2i", 1, 0))
    assert second == (b"D", b"a </s>")
    assert third[0] == b"X" and b"unknown request" in third[1]
    assert fourth == (b"E", struct.pack("<Q", 1) + struct.pack("<i", 1))


def test_worker_outlives_signals_to_its_group(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    command = [sys.executable, WORKER, tmp_path / "t.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.read(1) == b"H"
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                process.send_signal(number)
            process.communicate(timeout=30)  # its input ends
        finally:
            process.kill()
    assert process.returncode == 0


def test_worker_errors(tmp_path):
    pytest.importorskip("tokenizers")
    assert worker().returncode == 2
    (tmp_path / "t.json").write_text("{}")
    done = worker(tmp_path / "t.json")
    ((kind, message),) = frames(done.stdout)
    assert done.returncode == 1 and kind == b"X" and message.startswith(b"not a tokenizer: ")
