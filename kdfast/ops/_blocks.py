# SPDX-License-Identifier: Apache-2.0
"""Which table of block sizes the attention kernels take on the GPUs of this machine."""

import importlib
import os
from typing import Any

import torch

from kdfast.ops._flash import installed


def tables_in_use() -> list[tuple[str, str]]:
    """For every GPU, where its table comes from; a damaged or foreign file is named as such."""
    blocks: Any = importlib.import_module("kdfast.kernels._blocks")
    rows = []
    for index in range(torch.cuda.device_count()):
        arch = blocks.architecture(torch.device("cuda", index))
        try:
            table = blocks.table(arch)
            text = table.source + flash_note(table)
        except ValueError as error:
            text = f"cannot be used: {error}"
        rows.append((f"gpu {index}, {arch}", text))
    if not rows:
        named = os.environ.get(blocks.VARIABLE)
        text = f"{blocks.VARIABLE}={named} is not read without a GPU" if named else "no GPU"
        rows.append(("tables", text))
    return rows


def flash_note(table: Any) -> str:
    """What a table says of flash-attn, and whether it is followed; "" if nothing."""
    if not table.flash:
        return ""
    note = f"; flash-attn {table.flash_version} is faster for {len(table.flash)} kinds of calls"
    here = installed()
    if here == table.flash_version:
        return f"{note}, and takes them"
    return f"{note}, but {here or 'none'} is installed: it is not taken"
