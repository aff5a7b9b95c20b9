# SPDX-License-Identifier: Apache-2.0
"""A command whose packages are not installed says how to install them, without a traceback."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from kdfast.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("package", ["fsspec", "cv2"])
def test_a_missing_package_is_named(tmp_path, package):
    words = ["data", "shard", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    expected = (
        f"kdfast data: needs the package {package}, got none; run `pip install 'kdfast[train]'`"
    )
    assert done.stderr == f"error: {expected}\n"
