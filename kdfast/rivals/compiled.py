# SPDX-License-Identifier: Apache-2.0
"""torch.compile, with and without freezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.ops._torch_private import inductor_config
from kdfast.rivals.eager import DTYPES, TorchRival, given
from kdfast.rivals.plain import without_kdfast
from kdfast.rivals.rival import Loaded, told


class Compiled(TorchRival):
    """``torch.compile(model, dynamic=False)``, compiled when it is loaded."""

    effort = 2
    freezing = False

    def load(self, model: nn.Module | None, example: Tensor, folder: Path) -> Loaded:
        """As in ``Rival``."""
        plain = without_kdfast(given(model), example, DTYPES[self.dtype])
        # As an option too, so that torch does not take what it compiled without freezing: it keeps
        # graphs by the model's code and by the options.
        options: dict[str, Any] = {"freezing": True} if self.freezing else {}
        call = self.call_of(torch.compile(plain, dynamic=False, options=options))
        # The first call compiles, and the tracer asks the configuration, not the options.
        with told("torch.compile"), inductor_config().patch(freezing=self.freezing):
            call(example)
        return Loaded(call)


class Frozen(Compiled):
    """The same with ``torch._inductor.config.freezing``, which packs the weights."""

    freezing = True
