# SPDX-License-Identifier: Apache-2.0
"""Pickles from the internet: arrays and containers are read, everything else is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from kdfast.data.orion.unpickle import RefusedPickleError, load_object_npz, load_pickle


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


@pytest.mark.parametrize(
    "thing",
    [
        _Evil(),
        np.random.default_rng(0),
        Path("x"),
        [{"folder": "v1/a", "frame_idx": 0, "x": _Evil()}],
    ],
    ids=["function", "generator", "path", "inside"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_that_ask_for_more_are_refused(
    thing: object, protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b2d_infos_train.pkl"
    path.write_bytes(pickle.dumps(thing, protocol=protocol))
    with pytest.raises(RefusedPickleError, match="asks for"):
        load_pickle(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_are_read(protocol: int, tmp_path: Path) -> None:
    held = [
        {
            "a": np.arange(6.0).reshape(2, 3)[:, ::-1],
            "s": np.array(["car", "lane"]),
            "n": np.float32(2.5),
            "o": np.array([1, "x", None], dtype=object),
            "e": np.zeros((0, 9)),
            "t": (1, {2}, b"bytes"),
        }
    ]
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(held, protocol=protocol))
    (got,) = load_pickle(path)
    assert np.array_equal(got["a"], held[0]["a"]) and got["s"].tolist() == ["car", "lane"]
    assert got["n"] == 2.5 and got["o"].tolist() == [1, "x", None] and got["t"] == held[0]["t"]
    assert got["e"].shape == (0, 9)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04.", b"no pickle", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"c"],
)
def test_damaged_pickles_end_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pkl"):
        load_pickle(path)


def test_a_pickle_cannot_make_an_array_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    # numpy.ndarray((2**40,)): the name is known, calling it is not allowed.
    path.write_bytes(b"cnumpy\nndarray\n((L1099511627776L\ntR.")
    with pytest.raises(ValueError, match=r"x\.pkl"):
        load_pickle(path)


def test_an_object_npz_that_runs_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "Town01_HD_map.npz"
    np.savez(path, arr=np.array(_Evil(), dtype=object))
    with pytest.raises(RefusedPickleError):
        load_object_npz(path)
