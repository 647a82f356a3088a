"""README.md's C++ project: it configures, its program compiles against the headers, links and runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libxlstm  # noqa: F401  (loads the library that the program is linked with)

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = Path(next(path for path in torch.ops.loaded_libraries if path.endswith("libxlstm_ops.so")))

pytestmark = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")


def block_of_readme(language):
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return found[0]


def run(*command, cwd=None):
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The project's build folder, with its program compiled and nothing of libxlstm built."""
    project = tmp_path_factory.mktemp("project")
    (project / "CMakeLists.txt").write_text(block_of_readme("cmake"))
    (project / "main.cpp").write_text(block_of_readme("cpp"))
    (project / "libxlstm").symlink_to(ROOT)
    options = ["-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", "-DXLSTM_CUDA=OFF"]
    said = run("cmake", "-S", project, "-B", project / "build", *options)
    assert "yaml" not in said.lower(), "models need torch alone"
    run("ninja", "-C", project / "build", "CMakeFiles/mine.dir/main.cpp.o")
    return project / "build"


def test_program_needs_models_and_operators_alone(build):
    targets = run("ninja", "-C", build, "-t", "query", "mine")
    assert "libxlstm_models.a" in targets and "libxlstm_ops.so" in targets
    assert "libxlstm_core" not in targets
    commands = run("ninja", "-C", build, "-t", "commands", "mine").splitlines()
    compiles = next(line for line in commands if "/main.cpp" in line)
    assert "-std=" in compiles and "-W" not in compiles, "warnings are the project's own choice"


def test_program_trains_a_step(build):
    """Linked by the project's own command, with the libraries of the tree under test in the place of its own, which would
    take minutes to build."""
    tree = OPERATORS.parents[1]
    link = run("ninja", "-C", build, "-t", "commands", "mine").splitlines()[-1]
    libraries = re.findall(r"(?<=\s)\S*libxlstm_\w+\.(?:a|so)(?=\s)", link)
    assert len(libraries) == 3, link
    for library in libraries:
        built = tree / library.removeprefix("libxlstm/")
        if not built.is_file():
            pytest.skip(f"{built} is not built")
        (build / library).parent.mkdir(parents=True, exist_ok=True)
        (build / library).symlink_to(built)
    run("sh", "-c", link, cwd=build)
    printed = re.search(r"^(\d+\.\d+) \[4, 65, 256\]$", run(build / "mine"), re.MULTILINE)
    assert printed and 4.5 < float(printed.group(1)) < 6.5, "ln 256 is 5.55"
