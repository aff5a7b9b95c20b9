# SPDX-License-Identifier: Apache-2.0
"""Which processor this is, by microarchitecture, for rules and results that differ between them."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import NamedTuple

from kdfast.ops._library import EXTENSION

_CPUINFO = Path("/proc/cpuinfo")
# Models of AMD's families, first to last. A core laid out smaller is the same microarchitecture:
# Zen 4c counts as Zen 4, Zen 5c as Zen 5.
_AMD: dict[int, tuple[tuple[int, int, str], ...]] = {
    0x17: (
        (0x00, 0x2F, "Zen"),
        (0x30, 0x4F, "Zen 2"),
        (0x50, 0x5F, "Zen"),
        (0x60, 0x7F, "Zen 2"),
        (0x90, 0x91, "Zen 2"),
        (0xA0, 0xAF, "Zen 2"),
    ),
    0x19: (
        (0x00, 0x0F, "Zen 3"),
        (0x10, 0x1F, "Zen 4"),
        (0x20, 0x5F, "Zen 3"),
        (0x60, 0xAF, "Zen 4"),
    ),
    0x1A: (
        (0x00, 0x2F, "Zen 5"),
        (0x40, 0x4F, "Zen 5"),
        (0x60, 0x7F, "Zen 5"),
    ),
}
# Models of Intel's family 6. Servers and clients of one name differ in their AVX-512 units.
_INTEL = {
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "Haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "Broadwell"),
    # Kaby, Coffee and Comet Lake are this core too.
    **dict.fromkeys((0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6), "Skylake client"),
    **dict.fromkeys((0x6A, 0x6C), "Ice Lake"),
    **dict.fromkeys((0x7D, 0x7E), "Ice Lake client"),
    **dict.fromkeys((0x8C, 0x8D), "Tiger Lake"),
    0xA7: "Rocket Lake",
    **dict.fromkeys((0x97, 0x9A), "Alder Lake"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "Raptor Lake"),
    **dict.fromkeys((0xAA, 0xAC), "Meteor Lake"),
    **dict.fromkeys((0xB5, 0xC5, 0xC6), "Arrow Lake"),
    0xBD: "Lunar Lake",
    0x8F: "Sapphire Rapids",
    0xCF: "Emerald Rapids",
    **dict.fromkeys((0xAD, 0xAE), "Granite Rapids"),
    0xAF: "Sierra Forest",
}
# Parts of the implementer Arm (0x41).
_ARM = {
    0xD0C: "Neoverse N1",
    0xD40: "Neoverse V1",
    0xD49: "Neoverse N2",
    0xD4F: "Neoverse V2",
    0xD84: "Neoverse V3",
    0xD8E: "Neoverse N3",
}


class Processor(NamedTuple):
    """A kind of processor.

    Attributes:
        vendor: As cpuid has it ("AuthenticAMD", "GenuineIntel"); "Arm" on aarch64.
        family: Family with its extension, as /proc/cpuinfo has it; of Arm the architecture.
        model: Model with its extension; of Arm the part.
        stepping: Stepping; of Arm the revision.
        name: Microarchitecture, such as "Zen 4" or "Sapphire Rapids"; of one that is not known here
            vendor, family and model, and without a signature the machine ("riscv64").
        slug: The name for files and rules: "zen4", "sapphire_rapids".
    """

    vendor: str
    family: int
    model: int
    stepping: int
    name: str
    slug: str


def identify(vendor: str, family: int, model: int, stepping: int) -> Processor:
    """The processor of a signature; see ``Processor``."""
    name = _name(vendor, family, model, stepping)
    known = name or (f"{vendor} family {family} model {model}" if family else vendor)
    # "Zen 4" is zen4: a generation belongs to its name.
    joined = re.sub(r"(?<=[a-z]) (?=\d+$)", "", known) if name else known
    slug = re.sub(r"[^a-z0-9]+", "_", joined.lower()).strip("_")
    return Processor(vendor, family, model, stepping, known, slug)


def _name(vendor: str, family: int, model: int, stepping: int) -> str | None:
    """The microarchitecture, or None."""
    if vendor == "AuthenticAMD":
        ranges = _AMD.get(family, ())
        return next((name for first, last, name in ranges if first <= model <= last), None)
    if vendor == "GenuineIntel" and family == 6:
        if model == 0x55:  # three generations of servers under one model
            return (
                "Skylake-SP" if stepping < 5 else "Cascade Lake" if stepping < 8 else "Cooper Lake"
            )
        return _INTEL.get(model)
    return _ARM.get(model) if vendor == "Arm" else None


@functools.cache
def processor() -> Processor:
    """The processor that this process runs on: by cpuid, without the extension by /proc/cpuinfo."""
    if EXTENSION is not None and (found := EXTENSION.cpu_signature())[0]:
        return identify(*found)
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""
    return identify(*_signature(text))


def _signature(cpuinfo: str) -> tuple[str, int, int, int]:
    """Vendor, family, model and stepping of the first processor in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in reversed(cpuinfo.splitlines()))
    found = {key.strip(): value.strip() for key, _, value in lines}
    if "vendor_id" in found and "cpu family" in found:
        numbers = (found.get(key, "") for key in ("cpu family", "model", "stepping"))
        # A hypervisor may hide the stepping ("unknown").
        family, model, stepping = (int(n) if n.isdigit() else 0 for n in numbers)
        return found["vendor_id"], family, model, stepping
    if "CPU implementer" in found:
        implementer, part = (int(found[f"CPU {key}"], 0) for key in ("implementer", "part"))
        vendor = "Arm" if implementer == 0x41 else f"Arm implementer {implementer:#x}"
        return vendor, int(found["CPU architecture"], 0), part, int(found["CPU revision"], 0)
    return platform.machine(), 0, 0, 0
