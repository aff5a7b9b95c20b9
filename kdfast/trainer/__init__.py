# SPDX-License-Identifier: Apache-2.0
"""The engine that trains any job and knows none of the runs that build one.

Its parts are ``loop``, ``job``, ``step``, ``watch`` and ``feed``; ``runs``, ``commits``, ``state``
and ``logs`` look after folders, checkpoints, random state and records.
"""

import importlib.util

_NEEDED = ("accelerate", "jinja2", "matplotlib", "psutil", "rich", "tensorboard", "yaml")
_missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"kdfast.trainer: needs {', '.join(_missing)}, run `pip install 'kdfast[train]'`"
    )
