# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from kdfast.machine import facts
from kdfast.ops import _processor
from kdfast.ops._processor import identify

AMD, INTEL = "AuthenticAMD", "GenuineIntel"
# Signatures of processors that are sold, and what they are.
KNOWN = [
    ((AMD, 23, 1, 2), "Zen", "zen"),  # EPYC 7001
    ((AMD, 23, 24, 1), "Zen", "zen"),
    ((AMD, 23, 49, 0), "Zen 2", "zen2"),  # EPYC 7002
    ((AMD, 23, 113, 0), "Zen 2", "zen2"),  # Ryzen 3000
    ((AMD, 25, 1, 1), "Zen 3", "zen3"),  # EPYC 7003
    ((AMD, 25, 33, 0), "Zen 3", "zen3"),  # Ryzen 5000
    ((AMD, 25, 80, 0), "Zen 3", "zen3"),
    ((AMD, 25, 17, 1), "Zen 4", "zen4"),  # EPYC 9004
    ((AMD, 25, 97, 2), "Zen 4", "zen4"),  # Ryzen 7000
    ((AMD, 25, 160, 2), "Zen 4", "zen4"),  # EPYC 97x4, Zen 4c
    ((AMD, 26, 2, 1), "Zen 5", "zen5"),  # EPYC 9005
    ((AMD, 26, 17, 0), "Zen 5", "zen5"),  # EPYC 9005 with Zen 5c
    ((AMD, 26, 36, 0), "Zen 5", "zen5"),
    ((AMD, 26, 68, 0), "Zen 5", "zen5"),  # Ryzen 9000
    ((INTEL, 6, 63, 2), "Haswell", "haswell"),
    ((INTEL, 6, 79, 1), "Broadwell", "broadwell"),
    ((INTEL, 6, 158, 10), "Skylake client", "skylake_client"),
    ((INTEL, 6, 85, 4), "Skylake-SP", "skylake_sp"),
    ((INTEL, 6, 85, 7), "Cascade Lake", "cascade_lake"),
    ((INTEL, 6, 85, 11), "Cooper Lake", "cooper_lake"),
    ((INTEL, 6, 106, 6), "Ice Lake", "ice_lake"),
    ((INTEL, 6, 126, 5), "Ice Lake client", "ice_lake_client"),
    ((INTEL, 6, 140, 1), "Tiger Lake", "tiger_lake"),
    ((INTEL, 6, 151, 2), "Alder Lake", "alder_lake"),
    ((INTEL, 6, 183, 1), "Raptor Lake", "raptor_lake"),
    ((INTEL, 6, 143, 8), "Sapphire Rapids", "sapphire_rapids"),
    ((INTEL, 6, 207, 2), "Emerald Rapids", "emerald_rapids"),
    ((INTEL, 6, 173, 1), "Granite Rapids", "granite_rapids"),
    (("Arm", 8, 0xD0C, 1), "Neoverse N1", "neoverse_n1"),  # Graviton 2
    (("Arm", 8, 0xD40, 1), "Neoverse V1", "neoverse_v1"),  # Graviton 3
    (("Arm", 8, 0xD4F, 1), "Neoverse V2", "neoverse_v2"),  # Graviton 4, Grace
]
UNKNOWN = [
    ((AMD, 27, 3, 0), "AuthenticAMD family 27 model 3", "authenticamd_family_27_model_3"),
    ((AMD, 26, 80, 0), "AuthenticAMD family 26 model 80", "authenticamd_family_26_model_80"),
    ((AMD, 21, 2, 0), "AuthenticAMD family 21 model 2", "authenticamd_family_21_model_2"),
    ((INTEL, 15, 6, 4), "GenuineIntel family 15 model 6", "genuineintel_family_15_model_6"),
    (
        ("HygonGenuine", 24, 1, 1),
        "HygonGenuine family 24 model 1",
        "hygongenuine_family_24_model_1",
    ),
    (("riscv64", 0, 0, 0), "riscv64", "riscv64"),
]
ZEN4 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 99
model\t\t: 99
stepping\t: 9
"""
GRAVITON3 = """processor\t: 0
BogoMIPS\t: 2100.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1
"""


@pytest.mark.parametrize(("signature", "name", "slug"), KNOWN + UNKNOWN)
def test_names(signature: tuple[str, int, int, int], name: str, slug: str) -> None:
    found = identify(*signature)
    assert found == (*signature, name, slug)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ZEN4, (AMD, 25, 17, 1)),
        (ZEN4.replace("stepping\t: 1", "stepping\t: unknown"), (AMD, 25, 17, 0)),
        (GRAVITON3, ("Arm", 8, 0xD40, 1)),
        (GRAVITON3.replace("0x41", "0x61"), ("Arm implementer 0x61", 8, 0xD40, 1)),
    ],
)
def test_signature_of_cpuinfo(text: str, expected: tuple[str, int, int, int]) -> None:
    assert _processor._signature(text) == expected


def test_without_cpuinfo_the_machine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processor, "EXTENSION", None)
    monkeypatch.setattr(_processor, "_CPUINFO", tmp_path / "gone")
    monkeypatch.setattr(_processor.platform, "machine", lambda: "x86_64")
    assert _processor.processor.__wrapped__().name == "x86_64"


@pytest.mark.usefixtures("compiled")
def test_cpuid_and_cpuinfo_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    by_cpuid = _processor.processor.__wrapped__()
    monkeypatch.setattr(_processor, "EXTENSION", None)
    assert by_cpuid == _processor.processor.__wrapped__()


def test_this_processor_is_in_the_facts() -> None:
    here = _processor.processor()
    assert here is _processor.processor()
    assert here == identify(*here[:4])
    assert facts.machine_facts()["family"] == here.name
