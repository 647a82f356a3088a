"""README.md's C++ project: it configures, and its program compiles against the headers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def block_of_readme(language):
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return found[0]


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
def test_project_of_the_readme(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(block_of_readme("cmake"))
    (tmp_path / "main.cpp").write_text(block_of_readme("cpp"))
    (tmp_path / "libxlstm").symlink_to(ROOT)
    options = ["-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", "-DXLSTM_CUDA=OFF"]
    done = subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "build", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "yaml" not in (done.stdout + done.stderr).lower(), "models need torch alone"
    targets = subprocess.run(["ninja", "-C", tmp_path / "build", "-t", "query", "mine"], capture_output=True, text=True).stdout
    assert "libxlstm_models.a" in targets and "libxlstm_ops.so" in targets
    done = subprocess.run(["ninja", "-C", tmp_path / "build", "CMakeFiles/mine.dir/main.cpp.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
