# SPDX-License-Identifier: Apache-2.0
"""One build for every torch: the extension may need nothing of torch but its stable C interface."""

import re
import shutil
import subprocess

import pytest

from kdfast.ops._library import EXTENSION

NM = shutil.which("nm")
pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.skipif(NM is None, reason="nm (binutils) is not installed"),
]


def undefined() -> set[str]:
    """Names of what the extension takes from other libraries, without versions."""
    assert NM is not None and EXTENSION is not None and EXTENSION.__file__
    command = [NM, "--dynamic", "--undefined-only", "--format=posix", EXTENSION.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[0].split("@")[0] for line in done.stdout.splitlines()}


def test_no_cpp_symbol_of_torch() -> None:
    """Such names change from release to release; the C functions are those of torch 2.10."""
    names = undefined()
    assert not {name for name in names if re.search(r"(2at|3c10|5torch|6caffe2)\d", name)}
    of_torch = {name for name in names if name.startswith(("aoti_", "torch_"))}
    assert {"aoti_torch_empty_strided", "torch_library_impl"} <= of_torch


def test_no_openmp() -> None:
    """Work runs on torch's threads: a second OpenMP would have its own."""
    assert not {name for name in undefined() if name.startswith(("GOMP", "omp_", "__kmpc"))}
