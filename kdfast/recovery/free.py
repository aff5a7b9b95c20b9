# SPDX-License-Identifier: Apache-2.0
"""What may change between the parts of a recovery run, and what an older one may lack."""

from kdfast.configs.fields import defaults_of
from kdfast.configs.recovery import Config

# It moves files or stops elsewhere, but computes the same; the key of a kept teacher leaves it out
# too.
FREE = (
    *("name", "output", "note", "teacher.cache", "data.workers", "data.cache"),
    *("run.max_steps", "run.save_every", "run.log_every", "run.eval_images", "run.device"),
    "run.orion_keys",
)
# What the recipe of an older version may lack.
DEFAULTS = defaults_of(Config)
