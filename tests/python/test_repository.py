"""Rules of the repository that a compiler does not check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = ("csrc", "cuda", "train", "tests", "libxlstm", "scripts")


def sources(*suffixes):
    files = [p for folder in OWN for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert files
    return files


def test_cpp_is_formatted():
    clang_format = Path(sys.executable).with_name("clang-format")
    if not clang_format.exists():
        pytest.skip("clang-format 14.0.6 (PyPI) is not installed")
    files = [str(p) for p in sources(".cpp", ".h", ".cu", ".cuh")]
    done = subprocess.run([clang_format, "--dry-run", "--Werror", *files], capture_output=True, text=True)
    assert done.returncode == 0, "run clang-format -i on: " + ", ".join(
        sorted({line.split(":")[0] for line in done.stderr.splitlines() if "error:" in line}))


@pytest.mark.parametrize("pattern, why", [
    (r"#include\s*[<\"]torch/torch\.h", "a translation unit with torch/torch.h costs 15 s: include what is used"),
    (r"#include\s*[<\"]torch/extension\.h", "a translation unit with torch/extension.h costs 25 s"),
    (r"torch::load|torch::save|jit::load", "checkpoints are safetensors and JSON, never pickle"),
    (r"file\(GLOB", "CMake lists its sources"),
])
def test_cpp_and_cmake_keep_the_rules(pattern, why):
    files = [*sources(".cpp", ".h", ".cu", ".cuh"), *ROOT.glob("**/CMakeLists.txt")]
    files = [p for p in files if ".venv" not in p.parts and not any(part.startswith("build") for part in p.parts)]
    bad = [str(p.relative_to(ROOT)) for p in files if re.search(pattern, p.read_text())]
    assert not bad, f"{why}: {bad}"


def test_python_never_unpickles():
    """Users may pickle a model; nothing here reads one."""
    files = [p for p in sources(".py") if p.name not in (Path(__file__).name, "test_pickle.py")]
    bad = [p for p in files if re.search(r"import.*\bpickle\b|from pickle|pickle\.loads?\b|weights_only=False", p.read_text())]
    assert not bad


def test_kernels_never_see_torch():
    bad = [p for p in (ROOT / "cuda").rglob("*") if p.suffix in (".cu", ".cuh", ".h")
           and re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())]
    assert not bad


def test_no_path_of_a_build_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(^|[^\w.])/(" + "work|root|farm" + r")/")
    bad = [name for name in listed.stdout.splitlines()
           if (ROOT / name).is_file() and (ROOT / name).suffix not in (".png",)
           and pattern.search((ROOT / name).read_text(errors="ignore"))]
    assert not bad


def test_layers_only_include_what_stands_below():
    """csrc/README.md: a layer uses only what stands below it. The link lists enforce symbols; headers need a look."""
    allowed = {
        "csrc/core": {"csrc/core"},
        "csrc/ops": {"csrc/ops", "cuda"},
        "csrc/nn": {"csrc/nn", "csrc/ops", "csrc/core"},
        "csrc/models": {"csrc/models", "csrc/nn", "csrc/ops", "csrc/core"},
        "csrc/data": {"csrc/data", "csrc/core"},
        "csrc/config": {"csrc/config", "csrc/core", "csrc/models/model_options.h", "csrc/models/model_kinds.h",
                        "csrc/data/task_options.h", "csrc/data/tokenizer_spec.h"},  # plain values
    }
    bad = []
    for folder, below in allowed.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".cpp", ".h"):
                continue
            for include in re.findall(r'#include "((?:csrc|train|cuda)/[^"]+)"', path.read_text()):
                if not any(include == b or include.startswith(b + "/") for b in below):
                    bad.append(f"{path.relative_to(ROOT)} includes {include}")
    assert not bad
