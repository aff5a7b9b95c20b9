# SPDX-License-Identifier: Apache-2.0
"""Packages, and the call of CMake that builds kdfast._C; flags live in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
PATH = os.environ.get("PATH", "")
OLDEST_TORCH = (2, 10)  # as in CMakeLists.txt


def cxx_compiler() -> str | None:
    """The C++ compiler that CMake would take, or None."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, COMPILERS)), None)


def wants_extension() -> bool:
    """KDFAST_BUILD_EXT: 1 builds, 0 does not, unset builds where a C++ compiler is found."""
    choice = os.environ.get("KDFAST_BUILD_EXT", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"KDFAST_BUILD_EXT must be 0, 1 or unset, got {choice!r}")
    if choice:
        return choice == "1"
    if cxx_compiler() is None:
        print("kdfast: no C++ compiler found, so this is a pure-Python install", file=sys.stderr)
        return False
    return True


def pybind11_include(torch_root: Path) -> Path:
    """The headers of pybind11's package, or else of the copy that torch ships."""
    try:
        import pybind11
    except ModuleNotFoundError:
        print("kdfast: pybind11 is not installed, torch's copy is taken", file=sys.stderr)
        return torch_root / "include"
    return Path(pybind11.get_include())


class CMakeBuild(build_ext):
    """Builds the extension by CMake into the place that setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        try:  # build requirements of the extension only, not of a pure-Python install
            import torch
        except ModuleNotFoundError as error:
            sys.exit(
                f"kdfast: {error} where it is built; `pip install torch pybind11 cmake ninja`, "
                "then `pip install --no-build-isolation`, or KDFAST_BUILD_EXT=0"
            )
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            sys.exit(f"kdfast: needs torch 2.10 to be built, got {torch.__version__}")
        torch_root = Path(torch.__file__).parent

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(os.environ.get("KDFAST_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        includes = [pybind11_include(torch_root), torch_root / "include"]
        includes.append(Path(sysconfig.get_paths()["include"]))
        cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{PATH}")
        if cmake is None:
            sys.exit("kdfast: cmake is missing; `pip install cmake ninja`, or KDFAST_BUILD_EXT=0")
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output.parent,
            "KDFAST_MODULE_NAME": output.name,
            "KDFAST_INCLUDE_DIRS": ";".join(map(str, includes)),
            "KDFAST_TORCH_LIB_DIR": torch_root / "lib",
            "KDFAST_TORCH_VERSION": torch.__version__,
            "KDFAST_TORCH_CUDA": torch.version.cuda or "",
            "KDFAST_CUDA": os.environ.get("KDFAST_CUDA", "AUTO"),
            "KDFAST_CUDA_ARCHS": os.environ.get("KDFAST_CUDA_ARCHS", ""),
            "KDFAST_PORTABLE": os.environ.get("KDFAST_PORTABLE", "OFF"),
            "KDFAST_SANITIZE": os.environ.get("KDFAST_SANITIZE", "OFF"),
        }
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.check_call([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *definitions])
        subprocess.check_call([cmake, "--build", build_dir])


setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["kdfast", "kdfast.*"]), "kdfast.kernels"],
    package_dir={"kdfast.kernels": "kernels"},
    ext_modules=[Extension("kdfast._C", sources=[])] if wants_extension() else [],
    cmdclass={"build_ext": CMakeBuild},
)
