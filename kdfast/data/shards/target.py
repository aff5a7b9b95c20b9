# SPDX-License-Identifier: Apache-2.0
"""The place that shards are written to: a folder of this machine, or one behind a URL."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec

from kdfast.data.shards.places import is_url
from kdfast.machine.files import clear_partials, replacing, write_text


class Target:
    """A folder whose files are whole as soon as they have their names.

    Attributes:
        out: Its path or URL.
    """

    def __init__(self, out: Path | str) -> None:
        """Name it.

        Raises:
            ImportError: The package for the URL is missing.
            ValueError: There is no such protocol.
        """
        self.out = str(out)
        self._files, self._base = None, self.out
        if is_url(out):
            try:
                self._files, self._base = fsspec.core.url_to_fs(self.out)
            except (ImportError, ValueError) as error:
                raise type(error)(f"--out: {out} cannot be written to: {error}") from error

    def where(self, name: str) -> str:
        """Address of a file, for messages."""
        return posixpath.join(self.out, name)

    def make(self) -> None:
        """Make the folder, and clear what a killed writer left."""
        if self._files is not None:
            self._files.makedirs(self._base, exist_ok=True)
            return
        Path(self._base).mkdir(parents=True, exist_ok=True)
        clear_partials(Path(self._base))

    def is_new(self) -> bool:
        """Whether the folder is absent or empty."""
        if self._files is not None:
            return not self._files.exists(self._base) or not self._files.find(self._base)
        path = Path(self._base)
        return not path.exists() or (path.is_dir() and not any(path.iterdir()))

    def read(self, name: str) -> bytes | None:
        """Content of a file; None where there is none."""
        try:
            if self._files is None:
                return (Path(self._base) / name).read_bytes()
            found: bytes = self._files.cat_file(posixpath.join(self._base, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            if self._files is None:
                return (Path(self._base) / name).stat().st_size
            return int(self._files.size(posixpath.join(self._base, name)))
        except FileNotFoundError:
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        if self._files is None:
            write_text(Path(self._base) / name, text)
            return
        self._files.pipe_file(posixpath.join(self._base, name), text.encode("utf-8"))

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Context with a file of this machine, which becomes a file of the folder at the end."""
        if self._files is None:
            with replacing(Path(self._base) / name) as partial:
                yield partial
            return
        with TemporaryDirectory() as folder:
            yield Path(folder) / name
            self._files.put_file(str(Path(folder) / name), posixpath.join(self._base, name))
