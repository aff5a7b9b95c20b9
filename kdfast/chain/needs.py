# SPDX-License-Identifier: Apache-2.0
"""What a chain of distillations needs: data, memory and disk."""

from __future__ import annotations

from pathlib import Path

from kdfast.chain.planning import chain_steps
from kdfast.configs.chain import ChainConfig
from kdfast.configs.fields import ConfigError
from kdfast.data.labelled import describe_classification
from kdfast.machine.needs import Need, disk_need
from kdfast.memory.steps import device_of, memory_need

# The number of classes is only known once the data is read; it makes little difference to memory.
CLASSES = 10


def chain_needs(config: ChainConfig) -> list[Need]:
    """Data, memory of the largest link's step, and disk."""
    found = [_data(config)]
    try:
        steps = chain_steps(config, CLASSES)
        plans = [step.configured_plan(device_of(config.device)) for step in steps]
    except ConfigError as error:
        return [*found, Need("models", "; ".join(error.problems), "see docs/use/vit_chain.md")]
    fix = "a smaller batch, or --set checkpointing=true"
    checkpoint = max(plan.checkpoint_bytes for plan in plans)
    return [*found, memory_need(plans, fix), disk_need(config.output, checkpoint)]


def _data(config: ChainConfig) -> Need:
    spec = config.data
    root = None if spec.root is None else Path(spec.root).expanduser()
    seed = config.seeds[0] if spec.seed is None else spec.seed
    try:
        found = describe_classification(
            spec.kind,
            root,
            subset=spec.set,
            size=spec.size,
            seed=seed,
            val_fraction=spec.val_fraction,
            verify=spec.verify,
        )
    except (OSError, ValueError, ImportError) as error:
        fix = "--set data.root=FOLDER, or --set data.kind=digits (docs/use/classification_data.md)"
        return Need("data", str(error), fix)
    return Need("data", found)
