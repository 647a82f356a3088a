"""README.md's C++ project: it configures, its program compiles against the headers, links and runs, with the folder added and
with the package installed."""

import importlib.util
import json
import os
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
TREE = OPERATORS.parents[1]

pytestmark = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")


def block_of_readme(language):
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return found[0]


def attempt(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def run(*command, cwd=None):
    done = attempt(*command, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def write_project(folder, cmake, program):
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(cmake)
    (folder / "main.cpp").write_text(program)
    return folder


def assert_trained_a_step(printed):
    found = re.search(r"^(\d+\.\d+) \[4, 65, 256\]$", printed, re.MULTILINE)
    assert found and 4.5 < float(found.group(1)) < 6.5, "ln 256 is 5.55"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The project's build folder, with its program compiled and nothing of libxlstm built."""
    project = write_project(tmp_path_factory.mktemp("project"), block_of_readme("cmake"), block_of_readme("cpp"))
    (project / "libxlstm").symlink_to(ROOT)
    options = ["-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", "-DXLSTM_CUDA=OFF"]
    said = run("cmake", "-S", project, "-B", project / "build", *options)
    assert "yaml" not in said.lower(), "models need torch alone"
    run("ninja", "-C", project / "build", "CMakeFiles/mine.dir/main.cpp.o")
    return project / "build"


def test_program_needs_models_and_operators_alone(build):
    assert {path.name for path in build.iterdir()} & {"lib", "bin"} == set(), "these are the project's own"
    targets = run("ninja", "-C", build, "-t", "query", "mine")
    assert "libxlstm_models.a" in targets and "libxlstm_ops.so" in targets
    assert "libxlstm_core" not in targets
    commands = run("ninja", "-C", build, "-t", "commands", "mine").splitlines()
    compiles = next(line for line in commands if "/main.cpp" in line)
    assert "-std=" in compiles and "-W" not in compiles, "warnings are the project's own choice"


def test_program_trains_a_step(build):
    """Linked by the project's own command, with the libraries of the tree under test in the place of its own, which would
    take minutes to build."""
    link = run("ninja", "-C", build, "-t", "commands", "mine").splitlines()[-1]
    libraries = re.findall(r"(?<=\s)\S*libxlstm_\w+\.(?:a|so)(?=\s)", link)
    assert len(libraries) == 3, link
    for library in libraries:
        built = TREE / library.removeprefix("libxlstm/")
        if not built.is_file():
            pytest.skip(f"{built} is not built")
        (build / library).parent.mkdir(parents=True, exist_ok=True)
        (build / library).symlink_to(built)
    run("sh", "-c", link, cwd=build)
    assert_trained_a_step(run(build / "mine"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Component cpp of the tree under test, installed into one folder and moved to another."""
    last = TREE / ("train/libxlstm_inference.a" if (TREE / "train").is_dir() else "csrc/models/libxlstm_models.a")
    if not last.is_file():
        pytest.skip(f"{last} is not built")
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", TREE, "--component", "cpp", "--prefix", folder / "first")
    return (folder / "first").rename(folder / "moved")


def find_package(project, prefix, python=sys.executable, **environment):
    """The attempt to configure a project into its folder build/."""
    options = ["-G", "Ninja", f"-DPython3_EXECUTABLE={python}", f"-DCMAKE_PREFIX_PATH={prefix}"]
    return attempt("cmake", "-S", project, "-B", project / "build", *options, env={**os.environ, **environment})


def readme_with_find_package(components=""):
    both = r"add_subdirectory\(.*\) +# installed: (find_package.*)\)"
    text, found = re.subn(both, rf"\1{components})", block_of_readme("cmake"))
    assert found == 1
    return text


def test_installed_package_trains_a_step(prefix, tmp_path):
    project = write_project(tmp_path, readme_with_find_package(), block_of_readme("cpp"))
    said = find_package(project, prefix)
    assert said.returncode == 0, said.stderr
    commands = run("ninja", "-C", project / "build", "-t", "commands", "mine")
    assert "-Werror" not in commands and str(ROOT) not in commands.replace(sys.prefix, "")
    assert "yaml" not in commands and "libxlstm_core" not in commands, "models need torch alone"
    run("ninja", "-C", project / "build")
    assert_trained_a_step(run(project / "build" / "mine"))


def test_installed_inference_reads_checkpoints(prefix, tmp_path):
    if not (prefix / "lib" / "libxlstm_inference.a").is_file():
        pytest.skip("built without inference")
    cmake = readme_with_find_package(" COMPONENTS inference").replace("xlstm_models", "xlstm_inference")
    program = """
        #include <iostream>
        #include "csrc/core/error.h"
        #include "csrc/data/tokenizer.h"
        #include "train/checkpoint.h"
        int main(int, char** argv) {
          for (const auto id : xlstm::data::make_tokenizer(argv[1])->encode("b a")) std::cout << id << " ";
          try {
            xlstm::train::load_model("nowhere");
          } catch (const xlstm::Error& error) {
            std::cout << error.what() << std::endl;
          }
        }"""
    project = write_project(tmp_path, cmake, program)
    said = find_package(project, prefix)
    assert said.returncode == 0, said.stderr
    run("ninja", "-C", project / "build")
    (project / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": [],
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "a": 1, "b": 2}}}))
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "tokenizers.py").write_text("raise ImportError('of the working folder')")

    def encode(python):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"XLSTM_PYTHON": python}
        return attempt(project / "build" / "mine", project / "tokenizer.json", cwd=project / "elsewhere", env=environment)

    if importlib.util.find_spec("tokenizers") is not None:
        done = encode(sys.executable)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("2 1 ") and "nowhere" in done.stdout
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    assert re.search("has no `tokenizers` package .*XLSTM_PYTHON", encode(str(tmp_path / "bare" / "bin" / "python")).stderr)


def test_a_component_that_is_optional_may_be_missing(prefix, tmp_path):
    cmake = readme_with_find_package(" OPTIONAL_COMPONENTS nothing")
    cmake += "\nmessage(STATUS \"nothing: ${libxlstm_nothing_FOUND}\")\n"
    project = write_project(tmp_path, cmake, block_of_readme("cpp"))
    said = find_package(project, prefix)
    assert said.returncode == 0 and "nothing: FALSE" in said.stdout, said.stderr
    needed = write_project(tmp_path / "needed", readme_with_find_package(" COMPONENTS nothing"), "")
    assert "has no component nothing" in reason_of_refusal(find_package(needed, prefix))


def reason_of_refusal(attempted):
    assert attempted.returncode != 0
    return " ".join(attempted.stderr.partition("Reason given by package:")[2].split("Call Stack")[0].split())


def fake_torch(folder, version):
    """A folder for PYTHONPATH with what a torch of that version, without CUDA, looks like."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}+cpu'\ncuda: Optional[str] = None\n")
    return str(folder)


def test_installed_package_refuses_another_torch(prefix, tmp_path):
    project = write_project(tmp_path / "project", readme_with_find_package(), "")
    version = torch.__version__.split("+")[0]
    reason = reason_of_refusal(find_package(project, prefix, PYTHONPATH=fake_torch(tmp_path / "old", "2.1.0")))
    minor = version.rpartition(".")[0]
    assert f"built with torch {version} and needs torch {minor}.*, " in reason, reason
    assert f"the torch of {sys.executable} is 2.1.0: set Python3_EXECUTABLE to" in reason, reason

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    assert f"the torch of {python} is missing: " in reason_of_refusal(find_package(project, prefix, python, PYTHONPATH=""))


def test_installed_cuda_package_refuses_torch_without_cuda(prefix, tmp_path):
    if "torch_cuda_wheel" not in (prefix / "lib" / "cmake" / "libxlstm" / "libxlstm-models.cmake").read_text():
        pytest.skip("built without CUDA kernels")
    project = write_project(tmp_path / "project", readme_with_find_package(), "")
    torch_without = fake_torch(tmp_path / "cpu", torch.__version__.split("+")[0])
    assert "needs a torch with CUDA" in reason_of_refusal(find_package(project, prefix, PYTHONPATH=torch_without))


def test_installed_package_refuses_components_it_lacks(prefix, tmp_path):
    project = write_project(tmp_path, readme_with_find_package(" COMPONENTS colour"), "")
    assert "no component colour" in reason_of_refusal(find_package(project, prefix))


def test_installed_files_stand_alone(prefix):
    """No path of the tree they come from, and every header that a header includes."""
    for path in prefix.rglob("*.cmake"):
        absolute = re.findall(r"""(?:^|[\s";=(])(/\w[\w.-]*/.*)""", path.read_text(), re.MULTILINE)
        assert not absolute, f"{path.name}: {absolute}"
    headers = prefix / "include" / "libxlstm"
    for path in headers.rglob("*.h"):
        for name in re.findall(r'#include "(.*)"', path.read_text(encoding="utf-8")):
            assert (headers / name).is_file(), f"{path.name} includes {name}"


def test_plain_install_is_the_python_package_alone(tmp_path):
    """setup.py packs it into the wheel."""
    if not list((TREE / "lib").glob("_C*.so")) or not (TREE / "bin" / "xlstm-bench").is_file():
        pytest.skip(f"{TREE} holds no Python package")
    run("cmake", "--install", TREE, "--prefix", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["libxlstm"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".h", ".a", ".cmake")]
