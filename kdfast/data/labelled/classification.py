# SPDX-License-Identifier: Apache-2.0
"""Reads a classification set by its kind, cuts its splits and augments its pictures."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.labelled import medmnist
from kdfast.data.labelled.augment import AugmentSpec, augmented, finish, short_side
from kdfast.data.labelled.cifar import CIFAR10, CIFAR100, read_cifar
from kdfast.data.labelled.classfolder import read_classfolder
from kdfast.data.labelled.embedded import read_digits, read_fashion_mnist, read_mnist5k
from kdfast.data.labelled.parquet import read_parquet
from kdfast.data.labelled.pictures import Store
from kdfast.data.labelled.raw import Raw, split
from kdfast.machine.spelling import did_you_mean

Item = dict[str, Any]

Root = str | Path | None
# Called with root, size and whether checksums of official files are compared.
_READERS: dict[str, Callable[[Root, int, bool], Raw]] = {
    "digits": lambda root, size, verify: read_digits(root),
    "mnist5k": lambda root, size, verify: read_mnist5k(root),
    "fashion_mnist": lambda root, size, verify: read_fashion_mnist(root),
    "imagefolder": lambda root, size, verify: read_classfolder(root),
    "parquet": lambda root, size, verify: read_parquet(root),
    "cifar10": lambda root, size, verify: read_cifar(CIFAR10, root, verify),
    "cifar100": lambda root, size, verify: read_cifar(CIFAR100, root, verify),
    **medmnist.READERS,
}
# A family of kinds: which one it is says ``subset``.
_FAMILIES = {"medmnist": tuple(medmnist.READERS)}
KINDS = (*_READERS, *_FAMILIES)
# Kinds of any pictures: what they are says the name of their folder.
_ANY = ("imagefolder", "parquet")
_SPLITS = ("train", "val", "test")


class LabelledImages(Dataset[Item]):
    """Map-style dataset of pictures with targets.

    An item is ``{"image": (3, S, S) float32 in [0, 1], "target": () int64 or (C,) float32,
    "index": int, "variant": int}``. It follows from the dataset, its index and its variant
    alone: not from workers, order or any global random state.

    Attributes:
        size: Side S of the square pictures.
        targets: (N,) int64 class numbers, or (N, C) float32 ones and zeros.
        variants: Number of different augmentations of a picture that are replayed.
    """

    def __init__(
        self,
        store: Store,
        targets: Tensor,
        size: int,
        *,
        spec: AugmentSpec | None = None,
        seed: int = 0,
        variants: int = 1,
    ) -> None:
        """Set up; ``spec`` None is the evaluation transform, which has one variant."""
        self.store, self.targets, self.size = store, targets, size
        self.spec, self.seed, self.variants = spec, seed, variants
        # Shared memory: workers that outlive an epoch must see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.store)

    @property
    def variant(self) -> int:
        """The variant of items that are asked for by their index alone."""
        return int(self._epoch) % self.variants

    def set_epoch(self, epoch: int) -> None:
        """Go to variant ``epoch % variants``, in running workers too; call it between epochs."""
        if epoch < 0:
            raise ValueError(f"set_epoch: epoch must be >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __getitem__(self, at: int | tuple[int, int]) -> Item:
        """The item of an index, in the epoch's variant, or of a pair (index, variant)."""
        return self.__getitems__([at])[0]

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[Item]:
        """The items of many places at once, which is how ``DataLoader`` asks for a batch."""
        now = self.variant
        pairs = [place if isinstance(place, tuple) else (place, now) for place in places]
        for index, variant in pairs:
            if not 0 <= index < len(self):
                raise IndexError(f"index: must be in [0, {len(self)}), got {index}")
            if not 0 <= variant < self.variants:
                raise IndexError(f"variant: must be in [0, {self.variants}), got {variant}")
        pictures = [self.store[index] for index, _ in pairs]
        if self.spec is None:
            images = finish(pictures, self.size)
        else:
            indices, variants = np.array(pairs, np.int64).T
            images = augmented(
                pictures, self.size, self.spec, seed=self.seed, index=indices, variant=variants
            )
        return [
            {"image": image, "target": self.targets[index], "index": index, "variant": variant}
            for image, (index, variant) in zip(images, pairs, strict=True)
        ]


@dataclass(frozen=True)
class Classification:
    """A classification set.

    Attributes:
        name: Name of the set.
        task: "multiclass" and "ordinal": one of the classes; "binary": one of two; "multilabel":
            any of the classes.
        class_names: Names of the classes, in the order of their numbers.
        train: Pictures to train on, in ``variants`` augmentations.
        val: Pictures to choose a model by.
        test: Pictures for the final result.
        facts: Everything that the items of ``train`` depend on, for the key of a teacher cache.
        folder: Name for folders of results: that of the set, or of the place where pictures are.
    """

    name: str
    task: str
    class_names: list[str]
    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    facts: dict[str, Any]
    folder: str = "data"

    @property
    def key(self) -> str:
        """Hash of ``facts``: equal keys have equal training items at every (index, variant)."""
        text = json.dumps(self.facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def build_classification(
    kind: str,
    root: str | Path | None = None,
    *,
    subset: str | None = None,
    size: int,
    seed: int,
    val_fraction: float = 0.1,
    test_fraction: float | None = None,
    augment: str | AugmentSpec = "default",
    variants: int = 1,
    memory: float = 1.5,
    verify: bool = True,
) -> Classification:
    """Read a classification set; docs/use/classification_data.md describes the kinds.

    Args:
        kind: One of ``KINDS``.
        root: Folder or file with the data; None for what a package ships.
        subset: Name of the set where the kind is "medmnist".
        size: Side S of the square items, whatever the size of the pictures.
        seed: Seed of the augmentation, and of the split where the set has none.
        val_fraction: Part of train that becomes val where the set has none.
        test_fraction: Likewise for test; by default 0.2 for the sets of packages, otherwise
            ``val_fraction``.
        augment: "default", "none", or the steps.
        variants: How many augmentations of each picture are replayed, one an epoch in turn.
            As many as epochs: never the same; 1: the same in every epoch.
        memory: GiB that the resized pictures of a split may take; above, they are read and
            resized every time they are used.
        verify: Compare the files of CIFAR (python version) and MedMNIST with the checksums of the
            official ones; False reads sets of the same format.

    Returns:
        The set; its items are not normalised, as models differ in that.

    Raises:
        FileNotFoundError: Data is missing; the message says how to get it.
        ImportError: The package that ships the set is missing.
        CorruptDataError: A picture cannot be read.
        ValueError: The kind is unknown, an option is out of range, or data is not of its format.
    """
    kind = _member(kind, subset)
    _check(kind, size, val_fraction, test_fraction, variants, memory)
    raw = _READERS[kind](root, size, verify)
    spec = _spec(augment, raw)
    test_fraction = _test_fraction(raw, test_fraction, val_fraction)
    parts = split(raw, seed=seed, val=val_fraction, test=test_fraction)
    short = short_side("auto" if spec is None else spec.crop, size)
    stores = [Store(part, short, int(memory * 2**30)) for part in parts]
    targets = [part.targets for part in parts]
    varied = variants if spec is not None else 1
    train = LabelledImages(stores[0], targets[0], size, spec=spec, seed=seed, variants=varied)
    val, test = (LabelledImages(stores[n], targets[n], size) for n in (1, 2))
    folder = _folder(kind, root)
    facts = _facts(raw, train)
    return Classification(raw.name, raw.task, raw.classes, train, val, test, facts, folder)


def _folder(kind: str, root: str | Path | None) -> str:
    """The kind, or for pictures of any sort the name of the place where they are."""
    place = "" if root is None or kind not in _ANY else Path(root).expanduser().resolve().name
    name = re.sub(r"[^\w.-]+", "_", place.removesuffix(".tar").removesuffix(".parquet"))
    return name.strip("._") or kind


def _facts(raw: Raw, train: LabelledImages) -> dict[str, Any]:
    spec = train.spec
    return {
        "data": raw.name,
        "content": train.store.digest,
        "size": train.size,
        "short side": train.store.short,
        "augmentation": "none" if spec is None else asdict(spec),
        "seed": None if spec is None else train.seed,
        "variants": train.variants,
        "torchvision": torchvision.__version__,
    }


def describe_classification(
    kind: str,
    root: str | Path | None = None,
    *,
    subset: str | None = None,
    size: int,
    seed: int,
    val_fraction: float = 0.1,
    verify: bool = True,
) -> str:
    """One line about a set: its splits and classes; no picture of a folder is decoded.

    Args:
        kind: One of ``KINDS``.
        root: Folder or file with the data.
        subset: Name of the set where the kind is "medmnist".
        size: Side of the items.
        seed: Seed of the split.
        val_fraction: Part of train that becomes val.
        verify: As in ``build_classification``.

    Raises:
        FileNotFoundError: Data is missing; the message says how to get it.
        ImportError: The package that ships the set is missing.
        ValueError: The kind is unknown, an option is out of range, or data is not of its format.
    """
    kind = _member(kind, subset)
    _check(kind, size, val_fraction, None, 1, 0)
    raw = _READERS[kind](root, size, verify)
    parts = split(raw, seed=seed, val=val_fraction, test=_test_fraction(raw, None, val_fraction))
    counts = [f"{len(part):,} {name}" for part, name in zip(parts, _SPLITS, strict=True)]
    return f"{raw.name}: {', '.join(counts)}; {len(raw.classes)} classes, {raw.task}"


def _test_fraction(raw: Raw, given: float | None, val_fraction: float) -> float:
    if given is not None:
        return given
    return val_fraction if raw.test_fraction is None else raw.test_fraction


def _member(kind: str, subset: str | None) -> str:
    """The kind that a family and the name of one of its sets mean."""
    if kind not in _FAMILIES:
        if subset is not None:
            names = ", ".join(_FAMILIES)
            raise ValueError(f"set: only kind {names} has sets, got {subset!r} of {kind!r}")
        return kind
    if subset not in _FAMILIES[kind]:
        names = ", ".join(_FAMILIES[kind])
        raise ValueError(f"set: must be one of {names}, got {subset!r}")
    return subset


def _check(
    kind: str,
    size: int,
    val_fraction: float,
    test_fraction: float | None,
    variants: int,
    memory: float,
) -> None:
    if kind not in _READERS:
        hint = did_you_mean(kind.lower(), KINDS)
        raise ValueError(f"kind: must be one of {', '.join(KINDS)}, got {kind!r}{hint}")
    if size < 8:
        raise ValueError(f"size: must be 8 or more, got {size}")
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if value is not None and not 0 < value <= 0.5:
            raise ValueError(f"{name}: must be in (0, 0.5], got {value}")
    if variants < 1:
        raise ValueError(f"variants: must be 1 or more, got {variants}")
    if memory < 0:
        raise ValueError(f"memory: must be 0 GiB or more, got {memory}")


def _spec(augment: str | AugmentSpec, raw: Raw) -> AugmentSpec | None:
    if isinstance(augment, AugmentSpec):
        return augment
    if augment == "none":
        return None
    if augment != "default":
        raise ValueError(f"augment: must be 'default', 'none' or an AugmentSpec, got {augment!r}")
    return AugmentSpec(flip=0.5 if raw.mirrored else 0.0)


def worker_init(worker: int) -> None:
    """For ``DataLoader(worker_init_fn=...)``: one thread, and own seeds for Python and numpy.

    The items need no seed; this is for transforms that users add.
    """
    del worker
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.set_num_threads(1)
