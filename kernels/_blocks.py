# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the attention kernels: the built-in table, and what was measured on a GPU.

``python -m bench.gpu --tune`` writes a file for the architecture that it ran on. Launches take the
blocks of the file that KDFAST_BLOCKS names, or of tables/ARCH.json beside this one, and the
built-in ones where there is neither. Nothing here needs Triton, so that ``kdfast.info`` can name
the table in use anywhere.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "tables"
VARIABLE = "KDFAST_BLOCKS"


class Blocks(NamedTuple):
    """Block sizes of a kernel, of which a call takes what suits its lengths."""

    rows: tuple[tuple[int, int], ...]  # (row block, warps) in order of preference
    cols: int  # column block
    stages: int  # of the pipeline


Key = tuple[str, int, int]  # kernel, widest head dim, bytes per element
# Stands for the width of head dims of two tiles in fp32, of which every warp keeps TF32 parts and
# remainders.
TWO = 0
# Chosen from compiled binaries, not timed on a GPU: no spills, and at most 99 KiB of shared memory,
# which every GPU from sm_80 to sm_100 has.
BLOCKS: dict[Key, Blocks] = {
    ("fwd", 64, 2): Blocks(((128, 8), (64, 4), (32, 4)), 64, 3),
    ("fwd", 128, 2): Blocks(((128, 8), (64, 8), (32, 4)), 64, 2),
    ("fwd", 64, 4): Blocks(((64, 8), (32, 4)), 32, 2),
    ("fwd", 128, 4): Blocks(((32, 8),), 16, 1),
    ("fwd", TWO, 4): Blocks(((32, 8),), 16, 1),
    ("dq", 64, 2): Blocks(((128, 8), (64, 4), (32, 4)), 64, 2),
    ("dq", 128, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("dq", 64, 4): Blocks(((32, 4),), 32, 1),
    ("dq", 128, 4): Blocks(((16, 4),), 16, 1),
    ("dq", TWO, 4): Blocks(((16, 4),), 16, 1),
    ("dkdv", 64, 2): Blocks(((128, 8), (64, 4), (32, 4)), 32, 2),
    ("dkdv", 128, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("dkdv", 64, 4): Blocks(((32, 8),), 32, 1),
    ("dkdv", 128, 4): Blocks(((16, 4),), 16, 1),
    ("dkdv", TWO, 4): Blocks(((16, 4),), 16, 1),
    # With the distance to a teacher's maps, and the kernel of its row sums.
    ("dq_maps", 64, 2): Blocks(((64, 4), (32, 4)), 32, 2),
    ("dq_maps", 128, 2): Blocks(((64, 8), (32, 8)), 16, 1),
    ("dq_maps", 64, 4): Blocks(((32, 8),), 32, 1),
    ("dq_maps", 128, 4): Blocks(((16, 8),), 16, 1),
    ("dq_maps", TWO, 4): Blocks(((16, 8),), 16, 1),
    ("dkdv_maps", 64, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("dkdv_maps", 128, 2): Blocks(((32, 8),), 16, 1),
    ("dkdv_maps", 64, 4): Blocks(((32, 8),), 16, 1),
    ("dkdv_maps", 128, 4): Blocks(((16, 8),), 16, 1),
    ("dkdv_maps", TWO, 4): Blocks(((16, 8),), 16, 1),
    ("distance", 64, 2): Blocks(((64, 4), (32, 4)), 64, 2),
    ("distance", 128, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("distance", 64, 4): Blocks(((64, 8), (16, 4)), 32, 1),
    ("distance", 128, 4): Blocks(((16, 4),), 16, 1),
    ("distance", TWO, 4): Blocks(((16, 4),), 16, 1),
    # With a bias, and the kernel of its gradient.
    ("fwd_bias", 64, 2): Blocks(((128, 8), (64, 4), (32, 4)), 64, 2),
    ("fwd_bias", 128, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("fwd_bias", 64, 4): Blocks(((32, 8),), 32, 1),
    ("fwd_bias", 128, 4): Blocks(((16, 4),), 16, 1),
    ("fwd_bias", TWO, 4): Blocks(((16, 4),), 16, 1),
    ("dq_bias", 64, 2): Blocks(((128, 8), (64, 4), (32, 4)), 32, 2),
    ("dq_bias", 128, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("dq_bias", 64, 4): Blocks(((32, 8),), 16, 1),
    ("dq_bias", 128, 4): Blocks(((16, 4),), 16, 1),
    ("dq_bias", TWO, 4): Blocks(((16, 4),), 16, 1),
    ("dkdv_bias", 64, 2): Blocks(((64, 8), (32, 4)), 32, 2),
    ("dkdv_bias", 128, 2): Blocks(((32, 8),), 32, 1),
    ("dkdv_bias", 64, 4): Blocks(((32, 8),), 16, 1),
    ("dkdv_bias", 128, 4): Blocks(((16, 4),), 16, 1),
    ("dkdv_bias", TWO, 4): Blocks(((16, 8),), 16, 1),
    ("dbias", 64, 2): Blocks(((64, 4), (32, 4)), 64, 2),
    ("dbias", 128, 2): Blocks(((32, 4),), 32, 1),
    ("dbias", 64, 4): Blocks(((16, 4),), 16, 2),
    ("dbias", 128, 4): Blocks(((16, 4),), 16, 2),
    ("dbias", TWO, 4): Blocks(((16, 4),), 16, 2),
}


class Flash(NamedTuple):
    """Calls for which flash-attn was measured to be faster than the kernels here."""

    dtype: str
    head_dim: int
    least: int  # tokens
    most: int
    matrices: int  # heads of all images, at least


class Table(NamedTuple):
    """What holds for an architecture."""

    blocks: dict[Key, Blocks]
    source: str  # where they come from, in words
    flash_version: str = ""  # of flash-attn, when it was measured
    flash: tuple[Flash, ...] = ()


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942"; "" for what is no GPU, where Triton interprets or only compiles."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def table(arch: str) -> Table:
    """The table of an architecture; its file is read once.

    Raises:
        ValueError: There is a file and it is damaged, or of another architecture.
    """
    named = os.environ.get(VARIABLE)
    packaged = FOLDER / f"{arch}.json"
    if arch and named:
        return read_table(Path(named).expanduser(), arch, VARIABLE)
    if arch and packaged.is_file():
        return read_table(packaged, arch, "packaged")
    return Table(dict(BLOCKS), "built in")


def read_table(path: Path, arch: str, how: str) -> Table:
    """The built-in blocks, with those of a file in their place.

    Args:
        path: The file.
        arch: The architecture that it must be of.
        how: How the file was found, for ``source``.

    Raises:
        ValueError: It cannot be read, or is not what ``text_of`` writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("kdfast_blocks") != FORMAT:
            raise ValueError(f'"kdfast_blocks" must be {FORMAT}')
        if content["arch"] != arch:
            raise ValueError(f"it is of {content['arch']}, and this GPU is {arch}")
        blocks = {key_of(name): blocks_of(name, value) for name, value in content["blocks"].items()}
        flash = content["flash"]
        wins = tuple(flash_of(win) for win in flash["wins"])
        source = f"{how}: {path}, measured on {content['device']}, {content['date']}"
        return Table(BLOCKS | blocks, source, str(flash["version"]), wins)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: must be a table of blocks that `python -m bench.gpu --tune` wrote for this "
            f"GPU: {reason}"
        ) from error


def name_of(key: Key) -> str:
    """How files write a key of ``BLOCKS``."""
    return " ".join(map(str, key))


def key_of(name: str) -> Key:
    """The key of ``BLOCKS`` that a file writes so."""
    known = {name_of(key): key for key in BLOCKS}
    if name not in known:
        raise ValueError(f"there is no kernel {name!r}")
    return known[name]


def blocks_of(name: str, value: dict[str, Any]) -> Blocks:
    """The blocks of an entry, checked."""
    rows = tuple((size, warps) for size, warps in value["rows"])
    found = Blocks(rows, value["cols"], value["stages"])
    sizes = [*(size for size, _ in rows), found.cols]
    whole = [*sizes, *(warps for _, warps in rows), found.stages]
    if not rows or not all(type(x) is int for x in whole):
        raise ValueError(f"{name}: rows, cols and stages must be whole numbers, got {value}")
    if any(x not in (16, 32, 64, 128, 256) for x in sizes):
        raise ValueError(f"{name}: sizes must be powers of two from 16 to 256, got {value}")
    if any(warps not in (1, 2, 4, 8, 16) for _, warps in rows) or not 1 <= found.stages <= 8:
        raise ValueError(f"{name}: warps must be 1 to 16 and stages 1 to 8, got {value}")
    return found


def flash_of(value: dict[str, Any]) -> Flash:
    """A win of flash-attn, checked."""
    found = Flash(**value)
    numbers = found[1:]
    if not isinstance(found.dtype, str) or not all(type(x) is int for x in numbers):
        raise ValueError(f"flash: a dtype and whole numbers are needed, got {value}")
    return found


def text_of(arch: str, facts: dict[str, str], table: Table) -> str:
    """A file for ``read_table``, of the entries that differ from the built-in ones.

    Args:
        arch: What it was measured on.
        facts: ``device`` and ``date``, and whatever else tells how it was measured.
        table: What was found.
    """
    changed = {
        name_of(key): blocks._asdict()
        for key, blocks in table.blocks.items()
        if blocks != BLOCKS[key]
    }
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in changed.items())
    flash = {"version": table.flash_version, "wins": [win._asdict() for win in table.flash]}
    head = json.dumps({"kdfast_blocks": FORMAT, "arch": arch, **facts})
    return f'{head[:-1]},\n "flash": {json.dumps(flash)},\n "blocks": {{\n{lines}\n }}}}\n'
