# SPDX-License-Identifier: Apache-2.0
"""A teacher's outputs for all training images of a link, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from kdfast.chain.link_run import LinkRun
from kdfast.chain.links import LinkModel
from kdfast.chain.teacher_cache import TeacherCache, teacher_key
from kdfast.configs.fields import as_config_error
from kdfast.trainer.feed import Batch
from kdfast.trainer.logs import LOG


def kept_logits(
    run: LinkRun, teacher: LinkModel, accelerator: Accelerator
) -> Callable[[Batch], Tensor]:
    """The teacher's outputs for all training images and variants, computed now or earlier.

    Args:
        run: The link that is taught.
        teacher: On the device of the run.
        accelerator: Autocast; the first process computes, the others wait.

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
    began = time.monotonic()
    if accelerator.is_main_process:
        with as_config_error(), accelerator.autocast():
            TeacherCache.build(
                teacher,
                data.train,
                folder,
                key=key,
                top_k=top_k,
                temperature=config.distill.temperature,
                batch_size=config.eval_batch,
                workers=config.data.workers,
            ).verify()
    accelerator.wait_for_everyone()
    with as_config_error():
        cache = TeacherCache.open(folder, key)
    LOG.info("%s: teacher outputs in %s, %.1f s", run.link.role, folder, time.monotonic() - began)

    def logits(batch: Batch) -> Tensor:
        with as_config_error():
            return cache.logits(batch.index, batch.variant).to(batch.images)

    return logits
