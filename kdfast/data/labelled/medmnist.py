# SPDX-License-Identifier: Apache-2.0
"""The twelve 2-D sets of MedMNIST, from their .npz files, and the two official metrics."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdfast.data.labelled.medmnist_info import SETS, SIZES, Info
from kdfast.data.labelled.pictures import ArraySource, Part
from kdfast.data.labelled.raw import Raw, resolve
from kdfast.data.labelled.unpack import check_unpacked

URL = "https://zenodo.org/records/10519652/files/"
SPLITS = ("train", "val", "test")


def file_name(name: str, native: int) -> str:
    """Name of the file of a set in one of its sizes."""
    return f"{name}.npz" if native == 28 else f"{name}_{native}.npz"


def native_size(size: int) -> int:
    """The smallest size of the files that is not below ``size``; the largest for all above."""
    return next((native for native in SIZES if native >= size), SIZES[-1])


@dataclass(frozen=True)
class Reader:
    """Reads one set.

    Attributes:
        name: Name of the set.
    """

    name: str

    def __call__(self, root: str | Path | None, size: int, verify: bool) -> Raw:
        """Read the file itself, or from a folder the one whose pictures fit ``size``.

        In a folder that has not got the fitting file, the largest one there is read.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not the official one (``verify``), or not of its format.
        """
        info, wanted = SETS[self.name], file_name(self.name, native_size(size))
        obtain = f"download {URL}{wanted}?download=1"
        sizes = ", ".join(file_name(self.name, native) for native in SIZES)
        path = resolve(self.name, root, f"one of {sizes}", obtain)
        if path.is_dir():
            names = [wanted, *(file_name(self.name, native) for native in reversed(SIZES))]
            found = next((path / name for name in names if (path / name).is_file()), None)
            if found is None:
                raise FileNotFoundError(
                    f"root: kind {self.name!r} needs one of {sizes}, got none in {path}; "
                    f"to get it: {obtain}"
                )
            path = found
        if verify:
            _verify(path, info)
        return _read(path, self.name, info)


READERS = {name: Reader(name) for name in SETS}


def _verify(path: Path, info: Info) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found not in info.md5:
        raise ValueError(
            f"{path.name}: must be an official file with md5 {' or '.join(info.md5)}, got {found}; "
            f"get it again; for a set of your own: --set data.verify=false (verify=False)"
        )


def _read(path: Path, name: str, info: Info) -> Raw:
    try:
        check_unpacked(path)
        # Without pickles: no code of the file can run.
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                f"{split}_{what}": file[f"{split}_{what}"]
                for split in SPLITS
                for what in ("images", "labels")
            }
    except (
        *(KeyError, OSError, ValueError, EOFError, MemoryError),
        *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
    ) as error:
        raise ValueError(f"{path.name}: must be an .npz file of MedMNIST: {error}") from error
    train, val, test = (
        Part.whole(
            ArraySource(arrays[f"{split}_images"], path.name),
            _targets(arrays[f"{split}_labels"], path.name, info),
        )
        for split in SPLITS
    )
    return Raw(name, train, val, test, list(info.classes), info.task)


def _targets(labels: NDArray[np.generic], name: str, info: Info) -> NDArray[np.generic]:
    columns = len(info.classes) if info.task == "multilabel" else 1
    if labels.ndim != 2 or labels.shape[1] != columns or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{name}: labels must be whole numbers (N, {columns}), "
            f"got {labels.dtype} {labels.shape}"
        )
    highest = 1 if info.task == "multilabel" else len(info.classes) - 1
    if labels.size and not (0 <= labels.min() and labels.max() <= highest):
        raise ValueError(
            f"{name}: labels must be in [0, {highest}], got {labels.min()} to {labels.max()}"
        )
    if info.task == "multilabel":
        return labels.astype(np.float32)
    return labels[:, 0].astype(np.int64)


def medmnist_auc(target: ArrayLike, score: ArrayLike, task: str) -> float:
    """Area under the ROC curve as MedMNIST's evaluator defines it.

    "multilabel": mean over the labels. "binary": of the second class. Otherwise: mean over the
    classes, each against all others.

    Args:
        target: (N,) class numbers, or (N, C) ones and zeros for "multilabel".
        score: (N, C) probabilities, or (N,) of the second class for "binary".
        task: "multiclass", "binary", "multilabel" or "ordinal".

    Returns:
        In [0, 1]; NaN where a class or label has no positives or no negatives.

    Raises:
        ValueError: The shapes do not fit the task.
    """
    from sklearn.metrics import roc_auc_score

    truth, scores = _checked(target, score, task)
    if task == "binary":
        truth, scores = truth[:, None], scores[:, None]
    elif task != "multilabel":
        truth = truth[:, None] == np.arange(scores.shape[1])
    # scikit-learn warns there; training on a small set would repeat that every epoch.
    if ((truth != 0).all(0) | (truth == 0).all(0)).any():
        return float("nan")
    columns = range(scores.shape[1])
    return float(np.mean([roc_auc_score(truth[:, c] != 0, scores[:, c]) for c in columns]))


def medmnist_acc(
    target: ArrayLike, score: ArrayLike, task: str, *, threshold: float = 0.5
) -> float:
    """Accuracy as MedMNIST's evaluator defines it.

    "multilabel": mean over the labels of the share that ``score > threshold`` gets right.
    "binary": the same for the second class. Otherwise: share of rows whose largest score is at
    the target.

    Args:
        target: (N,) class numbers, or (N, C) ones and zeros for "multilabel".
        score: (N, C) probabilities, or (N,) of the second class for "binary".
        task: "multiclass", "binary", "multilabel" or "ordinal".
        threshold: Probability above which a label counts, in "binary" and "multilabel".

    Raises:
        ValueError: The shapes do not fit the task.
    """
    from sklearn.metrics import accuracy_score

    truth, scores = _checked(target, score, task)
    if task == "binary":
        return float(accuracy_score(truth, scores > threshold))
    if task == "multilabel":
        columns = range(scores.shape[1])
        right = [accuracy_score(truth[:, c] != 0, scores[:, c] > threshold) for c in columns]
        return float(np.mean(right))
    return float(accuracy_score(truth, scores.argmax(1)))


def _checked(
    target: ArrayLike, score: ArrayLike, task: str
) -> tuple[NDArray[np.generic], NDArray[np.floating]]:
    """(N,) and (N,) for "binary", (N, C) and (N, C) for "multilabel", otherwise (N,) and (N, C)."""
    truth, scores = np.asarray(target), np.asarray(score)
    if task not in ("multiclass", "binary", "multilabel", "ordinal"):
        raise ValueError(f"task: must be one of the four of Classification, got {task!r}")
    if task == "binary" and scores.ndim == 2 and scores.shape[1] == 2:
        scores = scores[:, 1]
    wanted = scores.shape if task == "multilabel" else scores.shape[:1]
    if truth.shape != wanted or scores.ndim != (1 if task == "binary" else 2) or not len(truth):
        raise ValueError(
            f"metric: {task} targets and scores must fit, got {truth.shape} and {scores.shape}"
        )
    return truth, scores
