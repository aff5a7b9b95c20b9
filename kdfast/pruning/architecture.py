# SPDX-License-Identifier: Apache-2.0
"""The architecture of a saved model: its config.json, and the model that this builds.

See docs/use/pruning.md.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import VisionTransformer

from kdfast._version import __version__
from kdfast.machine.weights import FLOATS
from kdfast.models.eva import EVAViT
from kdfast.models.timm_args import check_timm, preprocessing
from kdfast.nn.accelerate import accelerate_layers, has_fast_layers
from kdfast.nn.attention import FusedAttention, qualified_name
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.behaviour import Differences, behaviour_differences, set_attributes
from kdfast.pruning.constant import ConstantBlock, constant_blocks, put
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.hf_adapter import HfAdapter
from kdfast.pruning.vit_adapter import VitAdapter

FORMAT = "kdfast.model/1"
# Arguments of torchvision's VisionTransformer, all of which it keeps as attributes.
TORCHVISION = (
    "image_size",
    "patch_size",
    "hidden_dim",
    "mlp_dim",
    "dropout",
    "attention_dropout",
    "num_classes",
    "representation_size",
)


def described(model: nn.Module, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model, checked to build one that computes the same.

    Raises:
        TypeError: The model's family is not known, or cannot be pruned.
        ValueError: The model is not what its configuration builds; the message says what differs.
    """
    section = _section(model)
    config = {**_config(model, section["family"], dict(model_args)), "kdfast": section}
    found = _against_rebuilt(model, config)
    pool = _pool(model)
    if any(found) and section["family"] == "timm" and pool is not None:
        # timm's reset_classifier changes the pool, but not the arguments that it recorded.
        arguments = {**config["model_args"], "global_pool": pool}
        pooled = {**config, "model_args": arguments}
        better = _against_rebuilt(model, pooled)
        if len(better.problems) < len(found.problems) or not any(better):
            config, found = pooled, better
    if not found.problems:
        found.problems.extend(_changed_tables(model, config))
    if found.problems:
        raise ValueError(
            "save_pretrained: the model must be what its architecture and arguments build; pass "
            "model_args if timm did not record them. Different here:\n  "
            + "\n  ".join(found.problems)
        )
    if found.attributes:
        section["attributes"] = found.attributes
    return config


def _section(model: nn.Module) -> dict[str, Any]:
    """The section "kdfast" of config.json: facts that the libraries' configurations lack."""
    anatomy = anatomy_of("save_pretrained", model)
    module = type(model).__module__
    family = next(
        (known for known in ("timm", "torchvision", "transformers") if module.startswith(known)),
        "EVAViT" if isinstance(model, EVAViT) else None,
    )
    if family is None:
        raise TypeError(
            f"save_pretrained: model must be a class of timm, torchvision, transformers or kdfast, "
            f"got {qualified_name(model)}"
        )
    # Tables that no file holds are computed anew, in fp32: another type has to be recorded.
    kept = set(model.state_dict())
    tables = {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in kept and buffer.is_floating_point() and family != "EVAViT"
    }
    constant = constant_blocks(model)
    return {
        "format": FORMAT,
        "version": __version__,
        "family": family,
        "class": type(model).__name__,
        "fused": any(isinstance(module, FusedAttention) for module in model.modules()),
        "fast_layers": has_fast_layers(model),
        "heads": [site.held for site in anatomy.attentions],
        "mlp_hidden": [len(site.held) for site in anatomy.mlps],
        "tables": {name: dtype for name, dtype in tables.items() if dtype != "float32"},
        **({"constant": constant} if constant else {}),
    }


def _config(model: Any, family: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The library's own configuration of the model, as JSON values."""
    if family == "EVAViT":
        return {"architecture": "EVAViT", "model_args": {**model.config, **model_args}}
    if family == "transformers":
        config = json.loads(model.config.to_json_string(use_diff=False))
        return {**config, "architectures": [type(model).__name__]}
    if family == "torchvision":
        if type(model).__name__ != "VisionTransformer":
            raise TypeError(
                "save_pretrained: a model of torchvision must be a VisionTransformer, got "
                f"{type(model).__name__}, which does not keep its arguments; save its state_dict"
            )
        arguments = {name: getattr(model, name) for name in TORCHVISION}
        layers = [layer for layer in model.encoder.layers if not isinstance(layer, ConstantBlock)]
        first = layers[0].self_attention
        counts = {
            "num_layers": len(model.encoder.layers),
            "num_heads": model.hidden_dim // first.head_dim,
        }
        return {
            "architecture": "VisionTransformer",
            "model_args": {**arguments, **counts, **model_args},
        }
    return _timm_config(model, model_args)


def _timm_config(model: Any, model_args: dict[str, Any]) -> dict[str, Any]:
    pretrained = {k: v for k, v in model.pretrained_cfg.items() if v is not None}
    pretrained = {k: v for k, v in pretrained.items() if k not in ("url", "file", "state_dict")}
    architecture = pretrained.pop("architecture", None)
    if not architecture:
        raise ValueError(
            "save_pretrained: a timm model must come from timm.create_model, which names its "
            "architecture; got one without"
        )
    arguments = {**getattr(model, "_model_args", {}), "num_classes": model.num_classes}
    arguments.update(model_args)
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": getattr(model, "global_pool", None),
        "model_args": arguments,
        "pretrained_cfg": {**pretrained, "num_classes": model.num_classes},
    }
    try:
        plain: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
        return plain
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save_pretrained: arguments of the architecture must be JSON values ({error}); "
            f"pass model_args with such values instead, got {arguments}"
        ) from error


def build(config: Mapping[str, Any]) -> nn.Module:
    """The architecture of a configuration, initialised at random."""
    section = config.get("kdfast") or _foreign(config)
    if not isinstance(section, Mapping):
        raise ValueError(f"load_pretrained: the section kdfast must be an object, got {section!r}")
    if section.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"load_pretrained: config.json must have format {FORMAT!r}, got "
            f"{section['format']!r} (written by kdfast {section.get('version')})"
        )
    try:
        model = _BUILDERS[section["family"]](config, section)
    except KeyError as error:
        raise ValueError(f"load_pretrained: config.json has no usable {error}") from error
    set_attributes(model, section.get("attributes", {}))
    if section.get("fast_layers"):
        accelerate_layers(model)
    return model


def _foreign(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section for a folder that kdfast did not write."""
    if config.get("architecture"):
        return {"family": "timm"}
    raise ValueError(
        "load_pretrained: config.json must be of kdfast, timm or Hugging Face, got one without "
        "'kdfast', 'architecture' and 'architectures'"
    )


def _build_eva(config: Mapping[str, Any], section: Mapping[str, Any]) -> nn.Module:
    return EVAViT(**known_arguments(EVAViT, config["model_args"]))


def _build_timm(config: Mapping[str, Any], section: Mapping[str, Any]) -> nn.Module:
    name, given = config["architecture"], config.get("model_args", {})
    check_timm(name, given)
    arguments = dict(given)
    arguments.setdefault("num_classes", config.get("num_classes", 1000))
    overlay = preprocessing(config.get("pretrained_cfg", {}))
    model = timm.create_model(name, pretrained=False, pretrained_cfg_overlay=overlay, **arguments)
    return _shrunk(VitAdapter(), model, section)


def _build_torchvision(config: Mapping[str, Any], section: Mapping[str, Any]) -> nn.Module:
    arguments = known_arguments(VisionTransformer, config["model_args"])
    return _shrunk(VitAdapter(), VisionTransformer(**arguments), section)


def known_arguments(kind: type[nn.Module], arguments: Any) -> dict[str, Any]:
    """Arguments of a class, checked to be its own and JSON values.

    Raises:
        ValueError: They are not.
    """
    known = inspect.signature(kind.__init__).parameters
    if not isinstance(arguments, dict) or not set(arguments) <= set(known) - {"self"}:
        raise ValueError(
            f"load_pretrained: model_args must be arguments of {kind.__name__}, "
            f"got {arguments!r:.200}"
        )
    return arguments


def transformers_class(name: object) -> Any:
    library = importlib.import_module("transformers")
    kind: Any = getattr(library, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)):
        raise ValueError(
            f"load_pretrained: architecture {name!r} must be a model class of "
            f"transformers {library.__version__}"
        )
    return kind


def _build_transformers(config: Mapping[str, Any], section: Mapping[str, Any]) -> nn.Module:
    kind = transformers_class(section["class"])
    own = {name: value for name, value in config.items() if name != "kdfast"}
    return _shrunk(HfAdapter(), kind(kind.config_class.from_dict(own)), section)


_BUILDERS = {
    "EVAViT": _build_eva,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "transformers": _build_transformers,
}


def _shrunk(
    adapter: VitAdapter | HfAdapter, model: nn.Module, section: Mapping[str, Any]
) -> nn.Module:
    if "heads" not in section:
        return model
    for name, channels in section.get("constant", {}).items():
        _replace_block(model, name, channels)
    anatomy = Anatomy.of(adapter, model)
    held = [site.held for site in anatomy.attentions]
    widths = [len(site.held) for site in anatomy.mlps]
    heads, mlp = section["heads"], section["mlp_hidden"]
    _check_kept(heads, mlp)
    # A model that was saved with stand-ins, perhaps with all its heads, gets them again.
    if section.get("fused") or heads != held or mlp != widths:
        if len(heads) != len(held) or len(mlp) != len(widths):
            raise ValueError(
                f"load_pretrained: config.json must describe {len(held)} attentions and "
                f"{len(widths)} MLPs, got {len(heads)} and {len(mlp)}"
            )
        adapter.shrink(anatomy, heads, mlp)
    return model


def _replace_block(model: nn.Module, name: str, channels: Any) -> None:
    """Puts what ``drop_blocks`` leaves in place of a block of the architecture.

    Raises:
        ValueError: There is no such block, or it has not that many channels.
    """
    block = dict(model.named_modules()).get(name) if name else None
    sizes = {size for tensor in block.parameters() for size in tensor.shape} if block else set()
    if type(channels) is not int or channels not in sizes:
        raise ValueError(
            "load_pretrained: config.json must name blocks of the architecture with their "
            f"channels, got {name!r} with {channels!r}"
        )
    put(model, name, ConstantBlock(channels))


def _check_kept(heads: Any, mlp: Any) -> None:
    """Raises ValueError unless these are lists of different numbers, and numbers."""

    def counts(values: Any) -> bool:
        whole = isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)
        return whole

    if not isinstance(heads, list) or not all(counts(r) and len(set(r)) == len(r) for r in heads):
        raise ValueError(f"load_pretrained: heads must be lists of numbers, got {heads!r:.200}")
    if not counts(mlp):
        raise ValueError(f"load_pretrained: mlp_hidden must be numbers, got {mlp!r:.200}")


def set_tables(model: nn.Module, tables: Mapping[str, str]) -> None:
    """Gives buffers that no file holds the types that a configuration names.

    Raises:
        ValueError: There is no such buffer, or no such type.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    for name, dtype in tables.items():
        owner, _, leaf = name.rpartition(".")
        buffer = dict(model.named_buffers()).get(name)
        if buffer is None or dtype not in names:
            raise ValueError(f"load_pretrained: tables must be buffers, got {name} of {dtype}")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(names[dtype])


def _against_rebuilt(model: nn.Module, config: Mapping[str, Any]) -> Differences:
    """How a model differs from what its configuration builds."""
    try:
        with torch.device("meta"):
            again = build(config)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        return Differences(
            [f"the recorded arguments must build the model, got: {error}; pass model_args"], {}
        )
    shapes = [
        {name: tuple(t.shape) for name, t in some.state_dict().items()} for some in (model, again)
    ]
    found = behaviour_differences(model, again)
    return Differences([*differences(*shapes), *found.problems], found.attributes)


class _Unfilled(TorchFunctionMode):
    """Inside, parameters are not drawn at random: only tables that are computed are right."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = ("normal_", "uniform_", "erfinv_")
        return args[0] if func.__name__ in drawn and args else func(*args, **(kwargs or {}))


def _changed_tables(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Buffers that no file holds and that are not what the configuration builds."""
    kept = set(model.state_dict())
    tables = {name: x for name, x in model.named_buffers() if name not in kept}
    if not tables or isinstance(model, EVAViT):
        return []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _Unfilled():
        again = dict(build(config).named_buffers())
    return [
        f"{name} is a table that no file holds, with other values than the one that is built"
        for name, table in tables.items()
        if name not in again or not torch.equal(again[name].to(table.dtype), table.cpu())
    ]


def _pool(model: nn.Module) -> str | None:
    """timm's name of the pool before the classifier, read where it pools."""
    head = getattr(model, "head", None)
    owners = [(head, "global_pool"), (head, "pool_type"), (model, "global_pool")]
    for pool in (getattr(owner, name, None) for owner, name in owners):
        kind = getattr(pool, "pool_type", pool)
        if isinstance(kind, str):
            return kind
    return None


def differences(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"not expected: {name}" for name in found if name not in wanted]
    return problems + [
        f"{name} has shape {shape}, expected {wanted[name]}"
        for name, shape in found.items()
        if name in wanted and wanted[name] != shape
    ]
