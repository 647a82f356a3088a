"""Builds the C++ library with CMake (the tree build/ that the scripts use too) and installs it into the package.

    pip install --no-build-isolation .

Needs torch in the environment, a C++20 compiler, CMake, and the libraries that README.md lists. Where nvcc is, the CUDA
kernels are built too; XLSTM_CUDA=ON or OFF in the environment decides otherwise.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGETS = ["xlstm-train", "xlstm-generate", "xlstm-eval", "xlstm-data", "xlstm-bench", "xlstm_python"]


class CMakeBuild(build_ext):
    def run(self):
        build = ROOT / "build"
        # All of them: an earlier configuration of build/ may have cached other values.
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DXLSTM_CPU_VARIANTS=all", f"-DPython3_EXECUTABLE={sys.executable}"]
        options += ["-DXLSTM_BUILD_TRAIN=ON", "-DXLSTM_BUILD_PYTHON=ON"]
        options += [f"-DXLSTM_CUDA={os.environ.get('XLSTM_CUDA', 'AUTO')}"]
        if not (build / "CMakeCache.txt").exists():
            options += ["-G", "Ninja"]
        options += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build, "--target", *TARGETS], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", Path(self.build_lib).resolve()], check=True)

    def get_source_files(self):
        return []


setup(ext_modules=[Extension("libxlstm._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
