# SPDX-License-Identifier: Apache-2.0
"""The training loop and what a run needs around it; ``kdfast.train`` is the entry point."""

import importlib.util

_NEEDED = ("accelerate", "matplotlib", "psutil", "rich", "tensorboard", "yaml")
_missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"kdfast.trainer: needs {', '.join(_missing)}, run `pip install 'kdfast[train]'`"
    )
