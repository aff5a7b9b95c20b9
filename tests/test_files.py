# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

from pathlib import Path

import pytest

from kdfast.machine.files import replacing


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "äöü file.json"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("half of the new")
        raise OSError("disk full")
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "new"
