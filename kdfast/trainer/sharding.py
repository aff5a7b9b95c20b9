# SPDX-License-Identifier: Apache-2.0
"""Models whose parameters, gradients and optimiser states lie in shards on all processes: FSDP2.

Every block is gathered for its own forward and backward only; see docs/use/several_devices.md.

``fully_shard`` is called here and not by Accelerate's ``FullyShardedDataParallelPlugin``. That one
is ignored without a word where the processes have no accelerator, takes one model, so that a frozen
teacher would stay whole on every device, and chooses blocks by the names of classes.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from kdfast.configs.fields import ConfigError
from kdfast.models.eva import EVAViT
from kdfast.pruning.blocks import blocks_of
from kdfast.trainer.gathered import is_sharded, module_state
from kdfast.trainer.processes import require_several

M = TypeVar("M", bound=nn.Module)
# Of every unit that is gathered at once: whether its shards alone stay after a forward.
_reshards: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
# Of every sharded model: the same without hooks, and with parameters that have no memory.
_outlines: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def shard(
    module: nn.Module,
    models: Sequence[nn.Module | None],
    accelerator: Accelerator,
    *,
    read: Collection[nn.Module] = (),
) -> None:
    """Leave this process a shard of every parameter, in place; make the optimiser afterwards.

    All processes take the weights of the first one, as data-parallel training does. Units are the
    blocks of each model, what is left of it, and layers of ``module`` outside of the models.

    Args:
        module: What is trained, on the device.
        models: Those that it runs, its student and frozen teacher among them; None is left out.
        accelerator: Device and processes.
        read: Submodules whose parameters are read after their block's forward: their blocks stay
            gathered from the forward to the backward.

    Raises:
        ConfigError: There is one process only, or the blocks of a model are not known.
    """
    count, device = accelerator.num_processes, accelerator.device
    require_several("fsdp", count)
    # Nobody here writes into what a model returned, which is what torch warns of in each forward.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    blocks = {model: units_of(model) for model in models if model is not None}
    mesh = init_device_mesh(device.type, (count,))
    for model, parts in blocks.items():
        _outlines[model] = _outline(model)
        _take_from_first((*model.parameters(), *model.buffers()))
        frozen = not any(p.requires_grad for p in model.parameters())
        for part in parts:
            held = not frozen and any(inner in read for inner in part.modules())
            _unit(part, mesh, reshard=not held)
        # What lies around the blocks of a student is needed again as soon as the backward begins.
        _unit(model, mesh, reshard=frozen)
        if isinstance(model, EVAViT):
            register_fsdp_forward_method(model, "trace")
    for part in list(module.modules()):
        own = list(part.parameters(recurse=False))
        if any(not isinstance(p, DTensor) for p in own):
            _take_from_first(own)
            _unit(part, mesh, reshard=False)


def units_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, each of which is gathered for itself.

    Raises:
        ConfigError: They are not known.
    """
    try:
        return blocks_of(model)
    except TypeError as error:
        raise ConfigError([f"shard: fsdp must know the blocks of every model: {error}"]) from error


def _outline(model: M) -> M:
    """A copy with parameters of no memory."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


@torch.no_grad()
def _take_from_first(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        dense = tensor.contiguous()
        dist.broadcast(dense, 0)
        if dense is not tensor:
            tensor.copy_(dense)


def _unit(module: nn.Module, mesh: DeviceMesh, *, reshard: bool) -> None:
    unit = fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    _reshards[module] = reshard
    if mesh.device_type == "cpu":
        # gloo adds, but has no mean.
        unit.set_force_sum_reduction_for_comms(True)


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """``accelerator.prepare`` without DDP: shards or the loop's own exchange take its place.

    Args:
        accelerator: Autocast and processes.
        module: What is trained.
        optimizer: Over its parameters, sharded or not.
    """
    if is_sharded(module):
        # Autocast would keep its copies of all gathered weights until the forward of it ends.
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    # In this mode Accelerate leaves DDP out.
    module = accelerator.prepare_model(module, evaluation_mode=True)
    return module, accelerator.prepare_optimizer(optimizer)


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Context in which sharded models are whole, and a forward without gradients exchanges nothing.

    So processes may run different numbers of forwards. Entered by all of them together.

    Args:
        models: Those that are not sharded, or None, are left alone.
    """
    parts = [part for model in models if model is not None for part in model.modules()]
    units = [part for part in dict.fromkeys(parts) if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(_reshards[unit], recurse=False)


@torch.no_grad()
def whole(model: M) -> M:
    """A plain model with all the weights, the same one where it is not sharded.

    Called by all processes together, once for each model; every one of them gets all weights.
    """
    outline: Any = _outlines.pop(model, None)
    if outline is None:
        return model
    device = next(model.parameters()).device
    outline.load_state_dict(module_state(model), assign=True)
    made: M = outline.train(model.training).to(device)
    return made


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor that lies in shards as a whole one; any other as it is. Called by all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value
