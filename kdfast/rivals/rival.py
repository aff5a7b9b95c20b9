# SPDX-License-Identifier: Apache-2.0
"""What every way of running a model for inference has in common."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """A way that cannot be gone here; the message, one line, says why."""


class Loaded(NamedTuple):
    """A model that is ready to run.

    Attributes:
        call: From pictures (B, 3, H, W), fp32, of the example's shape, to the model's output, fp32.
        note: What is worth knowing about how it runs; may be empty.
    """

    call: Call
    note: str = ""


class Prepared(NamedTuple):
    """What ``Rival.prepare`` returns.

    Attributes:
        call: As in ``Loaded``.
        nbytes: Size of the model on disk.
        note: As in ``Loaded``.
    """

    call: Call
    nbytes: int
    note: str = ""


class Rival(ABC):
    """One way of running a model for inference, at ``torch.get_num_threads()`` threads.

    Attributes:
        name: As on the command line.
        dtype: Of the products with weights: "fp32", "bf16" or "int8".
        runtime: Library that runs it; rivals of one runtime may read each other's files.
        modules: What has to be installed for it.
        effort: How long it takes to get ready, compared with others: 0 short, 2 long.
        loads_model: Whether ``load`` takes the model itself, not what ``export`` wrote.
        about: What it is, for ``--help``.
    """

    name: str
    dtype: str
    runtime: str
    modules: tuple[str, ...] = ()
    effort: int = 1
    loads_model: bool = False
    about: str

    @abstractmethod
    def export(
        self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor], folder: Path
    ) -> None:
        """Writes what ``load`` reads.

        Args:
            model: On the CPU, in eval mode; it is not changed.
            example: (B, 3, H, W), fp32; the shape is the only one that will be run.
            pictures: Batches of the example's shape, for rivals that calibrate.
            folder: Where the files go; files of the same model and example may be there.

        Raises:
            Unavailable: The model or the machine is not made for it.
        """

    @abstractmethod
    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """Makes the model ready to run.

        Args:
            model: As in ``export``; None if not ``loads_model``.
            example: As in ``export``.
            folder: As in ``export``.

        Raises:
            Unavailable: The model or the machine is not made for it.
        """

    @abstractmethod
    def nbytes(self, model: nn.Module | None, folder: Path) -> int:
        """Size of the model on disk; arguments as in ``load``."""

    def require(self) -> None:
        """Imports the modules that it needs.

        Raises:
            Unavailable: One is not installed.
        """
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            raise Unavailable(f"not installed: {', '.join(missing)} (pip install 'kdfast[bench]')")
        for name in self.modules:
            importlib.import_module(name)

    def prepare(self, model: nn.Module, example: Tensor, pictures: Sequence[Tensor]) -> Prepared:
        """All steps in one process; files live in a temporary folder until the model is loaded.

        Args:
            model: As in ``export``.
            example: As in ``export``.
            pictures: As in ``export``.

        Raises:
            Unavailable: A package is missing, or the model or the machine is not made for it.
        """
        self.require()
        with tempfile.TemporaryDirectory(prefix="kdfast-") as name:
            folder = Path(name)
            self.export(model, example, pictures, folder)
            loaded = self.load(model if self.loads_model else None, example, folder)
            return Prepared(loaded.call, self.nbytes(model, folder), loaded.note)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns the errors of another library's export into Unavailable with their first line.

    Args:
        what: The step, for the message.
    """
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:  # exporters raise whatever their passes stumble over
        lines = [line for line in str(error).splitlines() if line.strip()]
        first = lines[0].strip() if lines else "no message"
        raise Unavailable(f"{what} failed: {type(error).__name__}: {first}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the advice that exporters give to their own developers off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def file_bytes(folder: Path, stem: str) -> int:
    """Bytes of all files in ``folder`` that are called ``stem`` up to their suffixes."""
    return sum(file.stat().st_size for file in folder.glob(f"{stem}.*"))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors, shared ones once, which is what a safetensors file takes."""
    sizes: dict[int, int] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        sizes[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def main_tensor(output: Any) -> Tensor:
    """The logits of a model's output, its pooled features, or else its features.

    Raises:
        TypeError: There is no tensor of these kinds.
    """
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model's output must hold a tensor, got {type(output).__name__}")
    return output
