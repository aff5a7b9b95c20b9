# SPDX-License-Identifier: Apache-2.0
"""Which table of block sizes the attention kernels take on the GPUs of this machine."""

import importlib
import os
from typing import Any

import torch


def tables_in_use() -> list[tuple[str, str]]:
    """For every GPU, where its table comes from; a damaged or foreign file is named as such."""
    blocks: Any = importlib.import_module("kdfast.kernels._blocks")
    rows = []
    for index in range(torch.cuda.device_count()):
        arch = blocks.architecture(torch.device("cuda", index))
        try:
            text = blocks.table(arch).source
        except ValueError as error:
            text = f"cannot be used: {error}"
        rows.append((f"gpu {index}, {arch}", text))
    if not rows:
        named = os.environ.get(blocks.VARIABLE)
        text = f"{blocks.VARIABLE}={named} is not read without a GPU" if named else "no GPU"
        rows.append(("tables", text))
    return rows
