"""`import libxlstm`: what it registers, what it refuses, and what it does not load."""

import inspect
import json
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import libxlstm

OPERATORS = [
    "mlstm_chunkwise", "mlstm_step", "mlstm_step_inputs", "mlstm_step_lazy", "mlstm_fold", "slstm", "causal_conv1d",
    "causal_conv1d_step", "headwise_norm", "residual_norm", "block_linear", "linear_cross_entropy", "gated_linear_attention",
    "gated_scan", "selective_scan", "wkv", "linear_int8", "quantize_int8", "dequantize_int8",
]
BUILD = Path(torch.ops.loaded_libraries.__iter__().__next__()).parent


def run(code, path=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered(name):
    assert callable(getattr(torch.ops.xlstm, name))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_documented(name):
    """help() has the operator's text with every argument in it, inspect.signature() what the schema takes, in its order."""
    operator = getattr(torch.ops.xlstm, name)
    arguments = operator.default._schema.arguments
    signature = inspect.signature(operator)
    assert list(signature.parameters) == [argument.name for argument in arguments]
    for argument in arguments:
        assert re.search(rf"\b{argument.name}\b", operator.__doc__.split("\n", 1)[1]), argument.name
    assert operator.__doc__.strip() in inspect.cleandoc(pydoc.render_doc(operator, renderer=pydoc.plaintext)).replace("\n    ", "\n")


def test_signature_of_an_operator():
    assert str(inspect.signature(torch.ops.xlstm.mlstm_step)) == (
        "(q, k, v, igate, fgate, c, n, m, *, input_gate='exp', normalize=True, scale=None, eps=1e-06)"
    )


def test_import_loads_the_operators_and_not_the_models():
    done = run("import sys, libxlstm; print('libxlstm._C' in sys.modules); libxlstm.Error; print('libxlstm._C' in sys.modules)")
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_torch_alone_is_enough_for_operators_and_models():
    """Its wheel asks for numpy no more; files of tokens are written with it."""
    done = run("import sys, warnings; warnings.simplefilter('ignore'); sys.modules['numpy'] = None; import libxlstm\n"
               "libxlstm.make_model(embedding_dim=8, num_blocks=1, num_heads=1, vocab_size=9)\n"
               "libxlstm.TokenWriter")
    assert re.search("line 3, in <module>\n(.*\n)*ModuleNotFoundError: .*numpy", done.stderr), done.stderr


def test_one_version():
    """It stands in __init__.py alone; CMake's goes into checkpoints."""
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml")
    root = Path(libxlstm.__file__).resolve().parent.parent
    if not (root / "CMakeLists.txt").is_file():
        pytest.skip("not the source tree")
    packaged = pyprojecttoml.read_configuration(root / "pyproject.toml")["project"]["version"]
    assert packaged == libxlstm.__version__ == json.loads((BUILD / "libxlstm_build.json").read_text())["version"]
    assert not [name for name in ("CMakeLists.txt", "pyproject.toml") if libxlstm.__version__ in (root / name).read_text()]


def test_unknown_attributes():
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        libxlstm.colour  # noqa: B018


@pytest.fixture
def copied_package(tmp_path):
    """An installed package as far as the operators go: __init__.py and lib/."""
    package = tmp_path / "libxlstm"
    shutil.copytree(Path(libxlstm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    (package / "lib").mkdir()
    (package / "lib" / "libxlstm_ops.so").symlink_to(BUILD / "libxlstm_ops.so")
    return tmp_path


def test_another_torch_is_refused_before_loading(copied_package):
    info = copied_package / "libxlstm" / "lib" / "libxlstm_build.json"
    info.write_text('{"torch": "2.1.0"}')
    done = run("import libxlstm", copied_package)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: libxlstm was built with torch 2.1.0, but torch ") and "2.1.*" in last
    info.write_text(json.dumps({"torch": torch.__version__}))
    assert run("import libxlstm", copied_package).returncode == 0


def test_a_package_without_its_library_says_how_to_build(copied_package):
    (copied_package / "libxlstm" / "lib" / "libxlstm_ops.so").unlink()
    done = run("import libxlstm", copied_package)
    assert "libxlstm_ops.so is in none of" in done.stderr and "pip install" in done.stderr


def test_library_was_built_with_this_torch():
    built = json.loads((BUILD / "libxlstm_build.json").read_text())
    assert torch.__version__.split("+")[0] == built["torch"] and built["version"] == libxlstm.__version__
    assert built["cuda"] is None or re.fullmatch(r"\d+\.\d+\.\d+ for \S+", built["cuda"])


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are missing")
@pytest.mark.parametrize("name", ["lib/libxlstm_ops.so", "bin/xlstm-train"])
def test_the_cpp_library_is_asked_before_torch(name):
    """libtorch.so of torch 2.11 has functions of std::filesystem of its own, and remove_all ends the program there."""
    path = Path(__file__).resolve().parents[2] / "build" / name
    if not path.exists():
        pytest.skip(f"{path} is not built")
    section = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    torch_at = min(at for at, library in enumerate(needed) if library.startswith("libtorch"))
    assert "libstdc++.so.6" in needed[:torch_at], needed
