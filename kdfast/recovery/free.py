# SPDX-License-Identifier: Apache-2.0
"""The one list of what may change between the parts of a recovery run."""

# It moves files or stops elsewhere, but computes the same; the key of a kept teacher leaves it out
# too.
FREE = (
    *("name", "output", "note", "teacher.cache", "data.workers", "data.cache"),
    *("run.max_steps", "run.save_every", "run.log_every", "run.eval_images", "run.device"),
    *("run.orion_keys", "run.shard"),
)
