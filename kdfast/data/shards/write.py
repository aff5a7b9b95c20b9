# SPDX-License-Identifier: Apache-2.0
"""Writes pictures into tar shards, byte for byte; a writer that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kdfast.data.shards.description import FORMAT, NAME, parsed
from kdfast.data.shards.names import divided
from kdfast.data.shards.tar_index import BLOCK, SUFFIX, Index, grouped, keeps_text, parsed_index
from kdfast.data.shards.target import Target
from kdfast.machine.signals import check

# As `sha256sum --check` reads it.
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Member:
    """One file of a sample.

    Attributes:
        name: In the shard.
        size: Bytes.
        content: The bytes, or how to read them.
        stamp: Differs where the content does.
    """

    name: str
    size: int
    content: bytes | Callable[[], bytes]
    stamp: str = ""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ValueError: They are not as many as they were.
        """
        data = self.content if isinstance(self.content, bytes) else self.content()
        if len(data) != self.size:
            raise ValueError(
                f"{self.name}: must have the {self.size} bytes that it had when the folder was "
                f"listed, got {len(data)}; run the command again"
            )
        return data


Sample = Sequence[Member]


@dataclass(frozen=True)
class Limits:
    """What a shard holds at most.

    Attributes:
        count: Samples; None: any.
        size: Bytes, unless one sample has more; None: any.
    """

    count: int | None = None
    size: int | None = None

    def full(self, count: int, size: int) -> bool:
        """Whether a shard of ``count`` samples takes none with which it has ``size`` bytes."""
        counted = self.count is not None and count >= self.count
        return counted or (self.size is not None and size > self.size)


@dataclass(frozen=True)
class Plan:
    """Which samples go into which shard.

    Attributes:
        kind: Of the source: imagefolder, images or bench2drive.
        shards: Samples by name of the shard.
        classes: Names of the classes, in the order of their numbers.
    """

    kind: str
    shards: dict[str, list[Sample]]
    classes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Hash of all that the shards follow from."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.kind, self.classes]).encode())
        for name, samples in self.shards.items():
            digest.update(f"{name}\n".encode())
            for member in (member for sample in samples for member in sample):
                text = f"{member.name}\0{member.size}\0{member.stamp}\n"
                digest.update(text.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def cut(prefix: str, samples: Sequence[Sample], limits: Limits) -> dict[str, list[Sample]]:
    """Shards ``prefix-000000.tar`` and so on, each of whole samples.

    Args:
        prefix: Of the names: the split, or ``all``.
        samples: In their order.
        limits: Of a shard.

    Raises:
        ValueError: Two samples would have one key.
    """
    keys = Counter(parts[0] for sample in samples if (parts := divided(sample[0].name)))
    twice = next((key for key, times in keys.items() if times > 1), None)
    if twice is not None:
        raise ValueError(f"SOURCE: two pictures would be the sample {twice}; rename one")
    shards: list[list[Sample]] = []
    used = 0
    for sample in samples:
        need = sum(2 * BLOCK + member.size for member in sample)
        if not shards or limits.full(len(shards[-1]), used + need):
            shards.append([])
            used = 0
        shards[-1].append(sample)
        used += need
    return {f"{prefix}-{number:06d}.tar": shard for number, shard in enumerate(shards)}


def write_shards(plan: Plan, out: Path | str, told: Callable[[str, int, bool], None]) -> str:
    """Write the shards of a plan that are not there yet, and the description of the set.

    Args:
        plan: What goes where.
        out: Folder or its URL; absent, empty, or of the same plan.
        told: Called after every shard with its name, its bytes, and whether it was there already.

    Returns:
        Where the description of the set is.

    Raises:
        FileExistsError: The folder holds something else.
        OSError: A picture cannot be read, or there is no room.
    """
    writing = Writing(out, plan.kind, plan.digest(), plan.classes, told)
    for name, samples in plan.shards.items():
        check()
        if writing.finished(name) is None:
            writing.write(name, samples)
    return writing.end()


class Writing:
    """A folder of shards that are written one after the other."""

    def __init__(
        self,
        out: Path | str,
        kind: str,
        digest: str,
        classes: Sequence[str],
        told: Callable[[str, int, bool], None],
    ) -> None:
        """Begin, or go on.

        Args:
            out: Folder or its URL; absent, empty, or of the same digest.
            kind: Of the source.
            digest: Of all that the shards follow from.
            classes: Names of the classes, in the order of their numbers.
            told: Called after every shard with its name, bytes, and whether it was there already.

        Raises:
            FileExistsError: The folder holds something else.
        """
        self.target, self.told = Target(out), told
        self.head = {"format": FORMAT, "kind": kind, "plan": digest, "classes": list(classes)}
        self.shards: list[dict[str, Any]] = []
        known = _started(self.target, digest)
        self.target.make()
        if not known:
            self._describe(whole=False)

    def finished(self, name: str) -> Index | None:
        """The index of a shard that was written before; None if it was not."""
        index = _finished(self.target, name)
        if index is not None:
            self._note(name, index, before=True)
        return index

    def write(self, name: str, samples: Sequence[Sample]) -> None:
        """Write one shard."""
        self._note(name, _write(self.target, name, samples), before=False)

    def end(self) -> str:
        """Write the checksums and the description, and say where the latter is."""
        sums = "".join(f"{one['sha256']}  {one['name']}\n" for one in self.shards)
        self.target.write_text(SUMS, sums)
        return self._describe(whole=True)

    def _note(self, name: str, index: Index, *, before: bool) -> None:
        self.told(name, index.size, before)
        samples = len(grouped(index, self.target.where(name)))
        fact = {"bytes": index.size, "samples": samples, "sha256": index.sha256}
        self.shards.append({"name": name, **fact})

    def _describe(self, *, whole: bool) -> str:
        samples = sum(one["samples"] for one in self.shards)
        content = {**self.head, "whole": whole, "samples": samples, "shards": self.shards}
        self.target.write_text(NAME, json.dumps(content, indent=1) + "\n")
        return self.target.where(NAME)


def _started(target: Target, digest: str) -> bool:
    """Whether the folder is of this plan; False where it is empty or absent."""
    content = target.read(NAME)
    if content is None:
        if not target.is_new():
            raise FileExistsError(f"--out: must be a new or empty folder, got {target.out}")
        return False
    known = parsed(target.where(NAME), content)
    if known["plan"] != digest:
        raise FileExistsError(
            f"--out: {target.out} holds shards of other pictures or sizes ({known['kind']}); "
            f"nothing is overwritten, name another folder"
        )
    return True


def _finished(target: Target, name: str) -> Index | None:
    """The index of a shard that was written before, which is the last thing that is written."""
    beside = target.read(name + SUFFIX)
    if beside is None:
        return None
    index = parsed_index(target.where(name), beside)
    return index if index.size == target.size(name) else None


class _Hashed:
    """A file that is written once from its beginning, and its hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(data)
        return self._file.write(data)


def _write(target: Target, name: str, samples: Sequence[Sample]) -> Index:
    index = Index()
    with target.file(name) as partial, partial.open("wb") as file:
        hashed = _Hashed(file)
        for member in (member for sample in samples for member in sample):
            data = member.read()
            # Equal content gives equal shards, whenever and by whomever they are written.
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = member.size, 0o644
            hashed.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            index.add(member.name, hashed.size, member.size)
            index.crcs.append(zlib.crc32(data))
            if keeps_text(member.name, member.size):
                index.texts[member.name] = data.decode("utf-8", "replace")
            hashed.write(data + b"\0" * (-len(data) % BLOCK))
        hashed.write(b"\0" * 2 * BLOCK)
        hashed.write(b"\0" * (-hashed.size % tarfile.RECORDSIZE))
    index.size, index.sha256 = hashed.size, hashed.sha.hexdigest()
    target.write_text(name + SUFFIX, index.as_text())
    return index
