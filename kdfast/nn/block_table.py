# SPDX-License-Identifier: Apache-2.0
"""Which blocks and MLPs run fused in inference, and where each keeps its parts.

By qualified name, so that no library has to be imported to be known. B batch, N tokens, C channels,
H heads, D head dim, P hidden units.
"""

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdfast.nn import swin_blocks, transformers_attention
from kdfast.nn.attention import qualified_name
from kdfast.nn.block import QUICK, Branches, Mlp, MlpReader, Reader, inert
from kdfast.nn.timm_attention import TimmAttention, TimmEvaAttention, TimmRopeAttention
from kdfast.nn.torch_attention import TorchMultiheadAttention
from kdfast.ops._packed import Layer, hooked, is_plain_linear
from kdfast.ops.sdpa import self_attention

# What follows the first layer of an MLP, and the factor of the channels that go into and out of it.
_ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
}


def activation(module: Any) -> str | None:
    """Name of what an activation module computes, or None if it is not known."""
    if hooked(module):
        return None
    name = _ACTIVATIONS.get(qualified_name(module))
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


def layer(linear: Any, gain: Tensor | None = None, reach: float = 1.0) -> Layer:
    """A linear layer, its output times ``gain``, its input times ``reach``."""
    return Layer((linear.weight,), (linear.bias,), gain, reach=reach)


def plain_mlp(
    first: Any, act: Any, out: Any, gain: Tensor | None = None, norm: nn.Module | None = None
) -> Mlp | None:
    """An MLP of two layers, if all of them are what they seem."""
    name = activation(act)
    if name is None or not is_plain_linear(first) or not is_plain_linear(out):
        return None
    if name != "quick_gelu":
        return Mlp(layer(first), None, name, norm, layer(out, gain))
    if norm is not None:
        return None
    # silu(1.702 x) / 1.702, with both factors in the weights.
    scaled = Layer((first.weight,), (first.bias,), factor=QUICK)
    return Mlp(scaled, None, "silu", None, layer(out, gain, 1 / QUICK))


def gated_mlp(
    gate: Any, value: Any, act: Any, out: Any, gain: Tensor | None, norm: nn.Module | None
) -> Mlp | None:
    """An MLP of three layers, ``out(norm(f(gate(x)) * value(x)))``."""
    name = activation(act)
    if name in (None, "quick_gelu") or not all(map(is_plain_linear, (gate, value, out))):
        return None
    return Mlp(layer(gate), layer(value), str(name), norm, layer(out, gain))


def _hidden_norm(norm: nn.Module) -> nn.Module | None:
    return None if type(norm) is nn.Identity and not hooked(norm) else norm


def timm_mlp(mlp: Any, gain: Tensor | None = None) -> Mlp | None:
    """``timm.layers.Mlp``."""
    if not inert(mlp.drop1, mlp.drop2):
        return None
    return plain_mlp(mlp.fc1, mlp.act, mlp.fc2, gain, _hidden_norm(mlp.norm))


def timm_swiglu(mlp: Any, gain: Tensor | None = None) -> Mlp | None:
    """``timm.layers.SwiGLU``."""
    if not inert(mlp.drop1, mlp.drop2):
        return None
    return gated_mlp(mlp.fc1_g, mlp.fc1_x, mlp.act, mlp.fc2, gain, _hidden_norm(mlp.norm))


def timm_glu(mlp: Any, gain: Tensor | None = None) -> Mlp | None:
    """``timm.layers.GluMlp``: gate and value are the halves of one layer."""
    name = activation(mlp.act)
    if name in (None, "quick_gelu") or not inert(mlp.drop1, mlp.drop2) or mlp.chunk_dim != -1:
        return None
    if not is_plain_linear(mlp.fc1) or not is_plain_linear(mlp.fc2):
        return None
    weights = mlp.fc1.weight.chunk(2)
    biases = (None, None) if mlp.fc1.bias is None else mlp.fc1.bias.chunk(2)
    halves = [Layer((w,), (b,)) for w, b in zip(weights, biases, strict=True)]
    gate, value = reversed(halves) if mlp.gate_last else halves
    return Mlp(gate, value, str(name), _hidden_norm(mlp.norm), layer(mlp.fc2, gain))


def hf_mlp(mlp: Any, gain: Tensor | None = None) -> Mlp | None:
    """``fc1``, ``activation_fn``, ``fc2`` of transformers."""
    return plain_mlp(mlp.fc1, mlp.activation_fn, mlp.fc2, gain)


def hf_swiglu(mlp: Any, gain: Tensor | None = None) -> Mlp | None:
    """``Dinov2SwiGLUFFN``."""
    return gated_mlp(mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj, gain, None)


def torchvision_mlp(mlp: Any, gain: Tensor | None = None) -> Mlp | None:
    """``torchvision.models.vision_transformer.MLPBlock``."""
    if len(mlp) != 5:
        return None
    first, act, drop1, out, drop2 = mlp
    return plain_mlp(first, act, out, gain) if inert(drop1, drop2) else None


MLPS: dict[str, MlpReader] = {
    "timm.layers.mlp.Mlp": timm_mlp,
    "timm.layers.mlp.SwiGLU": timm_swiglu,
    "timm.layers.mlp.GluMlp": timm_glu,
    "torchvision.models.vision_transformer.MLPBlock": torchvision_mlp,
    "torchvision.ops.misc.MLP": torchvision_mlp,
    "transformers.models.dinov2.modeling_dinov2.Dinov2SwiGLUFFN": hf_swiglu,
    (
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers."
        "Dinov2WithRegistersSwiGLUFFN"
    ): hf_swiglu,
}


def read_mlp(mlp: nn.Module, gain: Tensor | None) -> Mlp | None:
    """The parts of a block's MLP, whatever its class, if it is known."""
    read: Any = MLPS.get(qualified_name(mlp))
    if read is None or hooked(mlp):
        return None
    found: Mlp | None = read(mlp, gain)
    return found


def _quiet(*modules: nn.Module) -> bool:
    """Whether nothing watches modules whose forward is not called, or replaces it."""
    return not any(map(hooked, modules))


def timm_gain(module: Any) -> Tensor | None | bool:
    """The vector of a LayerScale; None for an identity; False for anything else."""
    if not _quiet(module):
        return False
    if type(module) is nn.Identity:
        return None
    if qualified_name(module) == "timm.layers.layer_scale.LayerScale":
        gamma: Tensor = module.gamma
        return gamma
    return False


def timm_block(
    block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Branches | None:
    """``timm.models.vision_transformer.Block``."""
    gains = timm_gain(block.ls1), timm_gain(block.ls2)
    if attn_mask is not None or is_causal or False in [g for g in gains if isinstance(g, bool)]:
        return None
    if not inert(block.drop_path1, block.drop_path2):
        return None
    return _timm_branches(block, (), *gains)


def timm_eva_block(
    block: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Branches | None:
    """``timm.models.eva.EvaBlock``."""
    if attn_mask is not None or is_causal or not inert(block.drop_path1, block.drop_path2):
        return None
    return _timm_branches(block, (rope,), block.gamma_1, block.gamma_2)


def _timm_branches(block: Any, args: tuple[Any, ...], gain1: Any, gain2: Any) -> Branches | None:
    attn = block.attn
    if type(attn) not in (TimmAttention, TimmRopeAttention, TimmEvaAttention) or not attn.heads:
        return None
    if attn.own_code():
        return None
    mlp = read_mlp(block.mlp, gain2)
    if mlp is None or not _quiet(attn) or not inert(attn.proj_drop):
        return None
    if not is_plain_linear(attn.proj):
        return None

    project = attn.projections()

    def attend(y: Tensor) -> Tensor:
        call = attn.project(y, *args) if project is None else attn.split(y, *args)
        # Where a gate reads the normed tokens, they are not projected beforehand.
        out: Tensor = attn.gated(y, attn.attend(call))
        return out

    return Branches(block.norm1, project, attend, layer(attn.proj, gain1), block.norm2, mlp)


def torchvision_block(block: Any, x: Tensor) -> Branches | None:
    """``torchvision.models.vision_transformer.EncoderBlock``."""
    attn = block.self_attention
    mlp = read_mlp(block.mlp, None)
    if type(attn) is not TorchMultiheadAttention or not attn.heads or not attn.batch_first:
        return None
    if mlp is None or not _quiet(attn) or not inert(block.dropout) or attn.own_code():
        return None
    if not is_plain_linear(attn.out_proj):
        return None

    def attend(y: Tensor) -> Tensor:
        out: Tensor = attn.attend(attn.project(y) if project is None else attn.split(y))
        return out

    project = attn.projections()
    return Branches(block.ln_1, project, attend, layer(attn.out_proj), block.ln_2, mlp)


class HfLayout(NamedTuple):
    """Where a layer of transformers keeps its parts.

    Attributes:
        attention: Name of the attention.
        out: Name of its output projection.
        norms: Names of both norms.
        gains: Names of the LayerScales, or none.
        drops: Names of what drops in training.
    """

    attention: str
    out: str
    norms: tuple[str, str]
    gains: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()


def hf_block(layout: HfLayout, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Branches | None:
    """A layer of transformers whose attention goes through kdfast's attention function."""
    attn = getattr(block, layout.attention)
    scales = [getattr(block, name) for name in layout.gains]
    # Classes of the layer's own file, whose forward was read; others may do anything.
    if any(type(part).__module__ != type(block).__module__ for part in (attn, *scales)):
        return None
    # A mask, or a wish for something else.
    if any(v is not None and v is not False for v in (*args, *kwargs.values())):
        return None
    if attn.config._attn_implementation != transformers_attention.NAME or attn.is_causal:
        return None
    projections = [getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", layout.out)]
    drops = [getattr(block, name) for name in layout.drops]
    if hooked(attn, transformers_attention.is_idle) or not _quiet(*scales) or not inert(*drops):
        return None
    if not all(map(is_plain_linear, projections)):
        return None
    gains = [scale.lambda1 for scale in scales] or [None, None]
    mlp = read_mlp(block.mlp, gains[1])
    if mlp is None:
        return None
    *qkv, out = projections
    project = Layer(tuple(p.weight for p in qkv), tuple(p.bias for p in qkv))
    norm1, norm2 = (getattr(block, name) for name in layout.norms)
    return Branches(norm1, project, _hf_attention(attn), layer(out, gains[0]), norm2, mlp)


def _hf_attention(attn: Any) -> Any:
    scale = attn.scaling if hasattr(attn, "scaling") else attn.scale
    backend = transformers_attention.backend_of(attn)

    def attend(y: Tensor) -> Tensor:
        q, k, v = y.unflatten(2, (3, -1, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self_attention(q, k, v, scale=scale, backend=backend)
        return out.transpose(1, 2).flatten(2)

    return attend


_VIT = HfLayout("attention", "o_proj", ("layernorm_before", "layernorm_after"), (), ("dropout",))
_DINO = HfLayout(
    *("attention", "o_proj", ("norm1", "norm2")), ("layer_scale1", "layer_scale2"), ("drop_path",)
)
_CLIP = HfLayout("self_attn", "out_proj", ("layer_norm1", "layer_norm2"))
# File of transformers' models, class of a layer, class of its MLP, and where it keeps its parts.
_HF = (
    ("vit.modeling_vit", "ViTLayer", "ViTMLP", _VIT),
    ("deit.modeling_deit", "DeiTLayer", "DeiTMLP", _VIT),
    ("ijepa.modeling_ijepa", "IJepaLayer", "IJepaMLP", _VIT),
    ("vit_mae.modeling_vit_mae", "ViTMAELayer", "ViTMAEMLP", _VIT),
    ("vit_msn.modeling_vit_msn", "ViTMSNLayer", "ViTMSNMLP", _VIT),
    ("dinov2.modeling_dinov2", "Dinov2Layer", "Dinov2MLP", _DINO),
    (
        "dinov2_with_registers.modeling_dinov2_with_registers",
        *("Dinov2WithRegistersLayer", "Dinov2WithRegistersMLP", _DINO),
    ),
    ("clip.modeling_clip", "CLIPEncoderLayer", "CLIPMLP", _CLIP),
    ("siglip.modeling_siglip", "SiglipEncoderLayer", "SiglipMLP", _CLIP),
    ("siglip2.modeling_siglip2", "Siglip2EncoderLayer", "Siglip2MLP", _CLIP),
)
MLPS.update({f"transformers.models.{file}.{mlp}": hf_mlp for file, _, mlp, _ in _HF})
BLOCKS: dict[str, Reader] = {
    **swin_blocks.readers(read_mlp),
    "timm.models.vision_transformer.Block": timm_block,
    "timm.models.eva.EvaBlock": timm_eva_block,
    "torchvision.models.vision_transformer.EncoderBlock": torchvision_block,
    **{
        f"transformers.models.{file}.{block}": functools.partial(hf_block, layout)
        for file, block, _, layout in _HF
    },
}
