# SPDX-License-Identifier: Apache-2.0
"""Ways of running a model for inference on this machine, kdfast among them.

See docs/use/compare.md.
"""

from kdfast.rivals.rival import Loaded, Prepared, Rival, Unavailable
from kdfast.rivals.table import RIVALS

__all__ = ["RIVALS", "Loaded", "Prepared", "Rival", "Unavailable"]
