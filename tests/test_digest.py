# SPDX-License-Identifier: Apache-2.0
"""Checksums of files."""

import hashlib

import pytest

from kdfast.machine.digest import CHUNK, file_digest


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_every_byte_counts(tmp_path, size):
    content = bytes(i * 7 % 251 for i in range(size))
    path = tmp_path / "file"
    path.write_bytes(content)
    assert file_digest(path) == hashlib.sha256(content).hexdigest()


def test_known_value(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(str(tmp_path / "abc")) == known


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        file_digest(tmp_path / "gone")
