# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kdfast.ops import OPS
from kdfast.ops._library import EXTENSION

ROOT = Path(__file__).resolve().parents[1]


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return set(listed.stdout.split())


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in tracked("."):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    table = "kernels/tables/sm_00.json"
    (source / table).parent.mkdir(exist_ok=True)
    (source / table).write_text("{}")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*build, "-w", str(tmp_path), str(source)],
        env={**os.environ, "KDFAST_BUILD_EXT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("kdfast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f for f in tracked("kdfast", "kernels") if f.endswith(".py")}
    want = {f if f.startswith("kdfast/") else f"kdfast/{f}" for f in modules}
    assert {n for n in names if n.endswith(".py")} == want
    assert {"kdfast/py.typed", f"kdfast/{table}"} <= set(names)
    top = next(n for n in names if n.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top).decode().split() == ["kdfast"]


def test_no_compiler_gives_a_pure_python_install(tmp_path: Path) -> None:
    code = "import runpy, setuptools; seen = {}; setuptools.setup = lambda **k: seen.update(k)\n"
    code += "runpy.run_path('setup.py'); print(seen['ext_modules'])"
    env = {"PATH": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert "no C++ compiler found, so this is a pure-Python install" in done.stderr


def test_isolated_build_says_what_it_lacks() -> None:
    """What `pip install .` runs into, as pip builds where no torch is."""
    code = "import runpy, setuptools, sys; setuptools.setup = lambda **k: None\n"
    code += "sys.modules['torch'] = None\n"
    code += "made = runpy.run_path('setup.py')['CMakeBuild'](setuptools.Distribution())\n"
    code += "made.build_extension(setuptools.Extension('kdfast._C', []))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "`pip install --no-build-isolation`, or KDFAST_BUILD_EXT=0" in done.stderr


def test_kernels_folder_is_only_kdfast_kernels() -> None:
    """As "kernels", which transformers looks for, it has no modules and is of no use."""
    import kdfast.kernels as kernels

    spec = importlib.util.spec_from_file_location("kernels", kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.__version__, list(module.__path__)) == ("0.0.0", [])
    assert importlib.util.find_spec("kdfast.kernels.kd_loss") is not None


def test_transformers_can_be_imported_in_the_checkout() -> None:
    code = (
        "from transformers import ViTModel; from transformers.utils import is_kernels_available;"
        "print(is_kernels_available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


def test_source_tree_without_install_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "kdfast").symlink_to(ROOT / "kdfast")
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)];"
        f"sys.path.insert(0, {str(tmp_path)!r}); import kdfast"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install --no-build-isolation -e ." in done.stderr


def test_one_file_of_each_kind_per_op() -> None:
    files = tracked(".")
    # Ops that share the page of another one.
    page = {"attention_entropy": "attention_distill", "head_gather_block": "head_gather"}
    for op in OPS:
        for path in (
            f"kdfast/ops/{op}.py",
            f"tests/test_{op}.py",
            f"docs/ops/{page.get(op, op)}.md",
        ):
            assert path in files, path


@pytest.mark.skipif(EXTENSION is None, reason="kdfast._C is not built")
def test_extension_has_no_build_path() -> None:
    assert EXTENSION is not None and EXTENSION.__file__ is not None
    done = subprocess.run(
        ["readelf", "-d", EXTENSION.__file__], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("readelf is not here")
    assert "RUNPATH" not in done.stdout and "RPATH" not in done.stdout


def test_cuda_is_built_for_every_architecture() -> None:
    if EXTENSION is None or not EXTENSION.build_info()["cuda"]:
        pytest.skip("kdfast._C is built without CUDA")
    if os.environ.get("KDFAST_CUDA_ARCHS"):
        pytest.skip("KDFAST_CUDA_ARCHS chose other architectures")
    built = EXTENSION.build_info()["cuda_archs"]
    assert [arch.split("-")[0] for arch in built.split()][:4] == ["80", "86", "89", "90"]
