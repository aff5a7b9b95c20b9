# SPDX-License-Identifier: Apache-2.0
"""States of modules and optimisers as whole tensors, whether or not processes share them out.

A file of a sharded run (FSDP2, whose parameters are ``DTensor``) is that of a plain one, so either
goes on with the other's. What is no ``DTensor`` passes through unchanged.

torch.distributed.checkpoint.state_dict has functions for this too. They are not used: they take a
step of an optimiser that has no state yet, so a state saved before the first step would not be the
one that was there, and they refuse optimisers without state and parameters without gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share out parameters of a module."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def module_state(module: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """``module.state_dict()`` with whole tensors, on the CPU where they were shared out.

    All processes have to call it.

    Args:
        module: Not behind a wrapper such as DDP; its parameters may be sharded.
        keep: Whether this process wants the state; otherwise it only takes part, and gets {}.
    """
    state = module.state_dict()
    for name, value in state.items():
        state[name] = _whole(value, keep)
    return state if keep else {}


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors; see ``module_state``.

    Args:
        optimizer: Over plain or sharded parameters.
        keep: See ``module_state``.
    """
    state: dict[str, Any] = _whole(optimizer.state_dict(), keep)
    return state if keep else {}


def load_module_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a state of ``module_state``, of which every process keeps its part.

    Args:
        module: See ``module_state``.
        state: The same on all processes; not changed.

    Raises:
        RuntimeError: Names or shapes are not those of the module.
    """
    own = module.state_dict()
    if any(isinstance(value, DTensor) for value in own.values()):
        state = {name: _part(value, own.get(name)) for name, value in state.items()}
    module.load_state_dict(state)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of ``optimizer_state``, of which every process keeps its part.

    Args:
        optimizer: Its parameters are in the order of the saved one's.
        state: The same on all processes; not changed.

    Raises:
        ValueError: The groups do not fit, or a sharded parameter has a state of another shape, of
            which nobody knows how it is shared out.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    places = [i for group in state["param_groups"] for i in group["params"]]
    if len(places) != len(own):
        raise ValueError(
            f"optimizer: must have {len(own)} parameters, got {len(places)} saved ones"
        )
    owner = dict(zip(places, own, strict=True))
    parts = {
        place: {name: _of_parameter(name, value, owner[place]) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _whole(part: Any, keep: bool) -> Any:
    """A part of a state with every ``DTensor`` gathered, by all processes in the same order."""
    if isinstance(part, DTensor):
        found = part.full_tensor()
        # Dropped at once where it is not wanted: together they may not fit a device.
        return found.cpu() if keep else None
    if isinstance(part, dict):
        return {name: _whole(value, keep) for name, value in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_whole(value, keep) for value in part)
    return part


def _part(value: Any, own: Any) -> Any:
    """This process's part of a whole tensor, shared out as ``own`` is."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    # All processes have the whole tensor, so none has to send anything.
    whole = value.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def _of_parameter(name: str, value: Any, parameter: Tensor) -> Any:
    """A state of a parameter, shared out as that is; numbers are the same on all processes."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"optimizer: the state {name!r} of a sharded parameter must have its shape "
            f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
        )
    return _part(value, parameter)
