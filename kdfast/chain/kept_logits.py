# SPDX-License-Identifier: Apache-2.0
"""A teacher's outputs for all training images of a link, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from kdfast.chain.cache_build import Progress
from kdfast.chain.link_run import LinkRun
from kdfast.chain.links import LinkModel
from kdfast.chain.teacher_cache import TeacherCache, teacher_key
from kdfast.configs.fields import ConfigError, as_config_error
from kdfast.machine.ranks import PeerError, Ranks
from kdfast.trainer.feed import Batch
from kdfast.trainer.logs import LOG


def kept_logits(
    run: LinkRun, teacher: LinkModel, accelerator: Accelerator
) -> Callable[[Batch], Tensor]:
    """The teacher's outputs for all training images and variants, computed now or earlier.

    Args:
        run: The link that is taught.
        teacher: On the device of the run.
        accelerator: Autocast; all processes compute.

    Returns:
        Gives the logits (B, C) of a batch.

    Raises:
        ConfigError: The kept outputs are damaged, or of something else; so does the function.
    """
    config, data = run.config, run.data
    key = teacher_key(teacher, data.facts, precision=config.precision)
    few = data.task == "multilabel" or config.cache_top_k >= len(data.class_names)
    top_k = None if few else config.cache_top_k
    kept = {"key": key, "top_k": top_k, "temperature": config.distill.temperature}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.cache_dir or run.folder.parent / "teacher_cache").expanduser() / digest
    began, ranks = time.monotonic(), Ranks.here()
    with _as_config_error(), accelerator.autocast(), _progress(run, accelerator) as progress:
        cache = TeacherCache.build(
            teacher,
            data.train,
            folder,
            key=key,
            top_k=top_k,
            temperature=config.distill.temperature,
            batch_size=config.eval_batch,
            workers=config.data.workers,
            progress=progress,
            ranks=ranks,
        )
        cache.verify(ranks)
    LOG.info("%s: teacher outputs in %s, %.1f s", run.link.role, folder, time.monotonic() - began)

    def logits(batch: Batch) -> Tensor:
        with as_config_error():
            return cache.logits(batch.index, batch.variant).to(batch.images)

    return logits


@contextmanager
def _as_config_error() -> Iterator[None]:
    """Turns what a user can mend into a ConfigError; what another process met is a line too."""
    try:
        with as_config_error():
            yield
    except PeerError as error:
        raise ConfigError([str(error)]) from error


@contextmanager
def _progress(run: LinkRun, accelerator: Accelerator) -> Iterator[Progress]:
    """Context with a bar on a terminal, of the rows of all processes."""
    quiet = None if accelerator.is_main_process else True
    name = f"teacher of {run.link.role}"
    with tqdm(desc=name, unit="picture", unit_scale=True, leave=False, disable=quiet) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
