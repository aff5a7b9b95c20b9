# SPDX-License-Identifier: Apache-2.0
"""One training of a link: what is trained, where its files are, and what a resume must keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.chain.links import Link
from kdfast.configs import plain
from kdfast.configs.chain import ChainConfig, per_link
from kdfast.configs.fields import defaults_of
from kdfast.data.labelled import Classification
from kdfast.resolve import file_name
from kdfast.trainer.state import identity

# What may change between the parts of a run: it moves files, or computes the same.
FREE = (
    *("name", "output", "note", "report", "cache_dir", "save_every", "log_every", "eval_batch"),
    *("device", "max_steps", "data.root", "data.workers", "data.verify"),
    # What a chain says about all of its links; a link's own part of it is compared.
    *("stage", "seeds", "vary", "twin", "chain", "model_args", "init", "batch", "epochs"),
    "vram_gib",
)
# What a recipe of an older version may lack.
DEFAULTS = defaults_of(ChainConfig)


@dataclass(frozen=True)
class LinkRun:
    """One training of a link.

    Attributes:
        config: The whole chain.
        link: The model.
        seed: Seed of weights, order and masks.
        folder: Where the link's files go.
        teacher: The link that teaches; None: none does.
        teacher_folder: Where the teacher's files are.
        data: The images.
    """

    config: ChainConfig
    link: Link
    seed: int
    folder: Path
    teacher: Link | None
    teacher_folder: Path | None
    data: Classification

    @property
    def name(self) -> str:
        """Start of the names of the link's files."""
        return f"{file_name(self.link.model)}_{self.link.role}"

    @property
    def logs(self) -> Path:
        """Folder of the link's CSV and JSON files."""
        return self.folder / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folder of the link's checkpoints."""
        return checkpoints_of(self.folder)

    @property
    def recipe(self) -> dict[str, Any]:
        """What must not change when the link is resumed."""
        link = self.link
        return identity(plain(self.config), FREE) | {
            "seed": self.seed,
            "init": link.init,
            "epochs": link.epochs,
            "distilled": link.distilled,
            "batch": per_link(self.config.batch, link.index),
        }


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of a link are in its folder."""
    return folder / "checkpoints"
