# SPDX-License-Identifier: Apache-2.0
"""Reads queries and keys out of a running forward pass, which keeps its fused attention.

See docs/use/attention_pictures.md. B batch, H heads, N tokens, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdfast.models.eva_layers import Attention as EvaAttention
from kdfast.nn.attention import FusedAttention
from kdfast.ops.geometry import Rope, Window
from kdfast.ops.pruned_attention import rotated
from kdfast.pictures.layer import LayerAttention

CLS_NAMES = ("cls_token", "class_token", "class_embedding")


@dataclass(frozen=True)
class Attentions:
    """Every self-attention of one forward pass.

    Attributes:
        images: (B, 3, H, W), the input of the model, with the pads that it adds for whole patches.
        layers: The attentions, in the order of execution.
        prefix: Number of tokens before the patches: CLS, registers.
        grid: (h, w) of the patches, row-major after the prefix; prefix + h * w = N.
        cls: Whether the first token is a CLS token.
        crop: (B, 3, Y, X) in [0, 1], what the model saw before its normalisation, with the same
            pads; None: it is not known.
        output: (B, C), what the model gave, where that is one row of numbers an image; else None.
    """

    images: Tensor
    layers: list[LayerAttention]
    prefix: int
    grid: tuple[int, int]
    cls: bool
    crop: Tensor | None = None
    output: Tensor | None = None

    @property
    def start(self) -> int | None:
        """The token that pictures start from: CLS, or None (the mean of all) without one."""
        return 0 if self.cls else None

    def patches(self, row: Tensor) -> Tensor:
        """The patches' part (..., h, w) of rows (..., N) over all tokens."""
        return row[..., self.prefix :].unflatten(-1, self.grid)


def capture(model: nn.Module, images: Tensor, crop: Tensor | None = None) -> Attentions:
    """Runs a model once, in eval mode, and keeps the queries and keys of its self-attentions.

    Whatever calls ``torch.nn.functional.scaled_dot_product_attention`` is seen: timm, Hugging Face
    (attn_implementation="sdpa") and this package's own modules; torchvision's
    ``nn.MultiheadAttention`` and ``EVAViT`` too. A timm module that was told not to use fused
    attention uses it for this call. The model is left as it was.

    Args:
        model: A vision transformer with square patches; not compiled.
        images: (B, 3, H, W), preprocessed for the model, on its device.
        crop: The same (B, 3, H, W) in [0, 1], before normalisation, for pictures of what was seen;
            without it they show each channel stretched to its own range.

    Returns:
        O(N) memory: two tensors (B, H, N, D) a layer, and no probabilities.

    Raises:
        TypeError: ``images`` is no floating tensor, or the patch size cannot be found.
        ValueError: ``images`` or ``crop`` has another shape, or tokens do not match the grid of
            patches.
        NotImplementedError: No self-attention over all tokens was seen, one is causal, or one
            attends within windows that only the model knows.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"capture: images must be a floating tensor, got {got}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"capture: images must be (B, 3, H, W), got {tuple(images.shape)}")
    if crop is not None and crop.shape != images.shape:
        raise ValueError(
            f"capture: crop must be like images {tuple(images.shape)}, got {tuple(crop.shape)}"
        )
    side = patch_size(model)
    watcher = Watcher(model, "capture", len(images))
    with torch.no_grad(), eval_and_fused(model), watcher.attached():
        output = model(images)
    # That of the model: a hybrid's patches are pixels of its features, others pad the image.
    grid = watcher.grid or (images.shape[2] // side, images.shape[3] // side)
    count = len(images)
    images = _padded(model, images, grid, side)
    crop = None if crop is None else _padded(model, crop, grid, side)
    layers = [layer for layer in watcher.layers if layer.tokens >= grid[0] * grid[1] > 0]
    if not layers:
        raise NotImplementedError(
            f"capture: {type(model).__name__} must call torch's scaled_dot_product_attention over "
            f"its {grid[0]} x {grid[1]} patches (and not be compiled), but no such call was seen"
        )
    counts = sorted({layer.tokens for layer in layers})
    if len(counts) > 1:
        raise ValueError(f"capture: every layer must have the same tokens, got {counts}")
    prefix = counts[0] - grid[0] * grid[1]
    names = (name.rsplit(".", 1)[-1] for name, _ in model.named_parameters())
    cls = prefix > 0 and any(name in CLS_NAMES for name in names)
    return Attentions(images, layers, prefix, grid, cls, crop, _rows(output, count))


def _rows(output: Any, count: int) -> Tensor | None:
    """The output as (B, C): logits of timm and torchvision, or those of Hugging Face."""
    found = getattr(output, "logits", output)
    if isinstance(found, Tensor) and found.dim() == 2 and len(found) == count:
        return found.detach()
    return None


def patch_size(model: nn.Module) -> int:
    """Side of a model's square patches: timm's, torchvision's, Hugging Face's or EVAViT's.

    Raises:
        TypeError: The model has no patch size, or patches are not square.
    """
    for owner in (*_embeds(model), model, getattr(model, "config", None)):
        size: Any = getattr(owner, "patch_size", None)
        sides = set(size) if isinstance(size, (tuple, list)) else {size}
        if len(sides) == 1 and isinstance(side := sides.pop(), int):
            return side
    raise TypeError(
        f"capture: model must have square patches (an int patch_size), got {type(model).__name__}"
    )


def _embeds(model: nn.Module) -> list[Any]:
    """What makes tokens of an image, by timm's names."""
    found = (getattr(model, name, None) for name in ("patch_embed", "embeds"))
    return [embed for embed in found if embed is not None]


def _padded(model: nn.Module, images: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The images with the pads, below and on the right, of a model that adds them by itself."""
    if not any(getattr(embed, "dynamic_img_pad", False) for embed in _embeds(model)):
        return images
    down, right = (max(0, n * side - x) for n, x in zip(grid, images.shape[2:], strict=True))
    return F.pad(images, (0, right, 0, down))


class Watcher(TorchFunctionMode):
    """Turns the attention calls of one forward pass into layers, named after their modules.

    Attributes:
        layers: The attentions so far.
        grid: (h, w) of what the last projection to patches before them gave; None without one.
    """

    def __init__(self, model: nn.Module, function: str, batch: int | None = None) -> None:
        """Watch a model.

        Args:
            model: The model.
            function: Name of the caller, for messages.
            batch: Number of images that every attention must have; None: windows are sequences too.
        """
        super().__init__()
        self.model, self.function, self.batch = model, function, batch
        self.layers: list[LayerAttention] = []
        self.grid: tuple[int, int] | None = None
        self._path: list[tuple[str, nn.Module, int | None]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks that follow which module runs, and this mode, until the block ends."""
        handles = []
        inside = {
            part
            for module in self.model.modules()
            if isinstance(module, FusedAttention)
            for part in list(module.modules())[1:]
        }
        try:
            for name, module in self.model.named_modules():
                if module in inside:  # a stand-in would not go around what is watched
                    continue
                enter = partial(self._enter, name)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3)
        first = next(inputs, None)
        self._path.append((name, module, None if first is None else first.shape[1]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name, *_ = self._path.pop()
        if not self.layers:
            self._see_grid(name, module, output)
        if isinstance(module, EvaAttention) and output is not None:
            (_, grid, rope, *_), (_, q, k, _) = args, output
            window = None
            if module.window_size:
                # A pad's value has no influence on probabilities; that it is a live key has.
                window = Window(grid, module.window_size, q.new_zeros(q.shape[1], q.shape[3]))
            self._add(name, q, k, None, rope=rope, window=window)

    def _see_grid(self, name: str, module: nn.Module, output: Any) -> None:
        """Keeps the places of a projection to patches, or what an embedding says of them."""
        projects = isinstance(module, nn.Conv2d) or name.endswith("patch_embed.proj")
        if projects and isinstance(output, Tensor) and output.dim() == 4:
            self.grid = (output.shape[2], output.shape[3])
        elif module is getattr(self.model, "embeds", None) and isinstance(output, tuple):
            given = output[1] if len(output) > 1 else None
            if given is not None and len(given) == 2:
                self.grid = (int(given[0]), int(given[1]))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name, module, tokens = self._path[-1] if self._path else ("", self.model, None)
        # EVAViT's own hook sees its calls also where they run the eager reference.
        if not isinstance(module, EvaAttention):
            if func is F.scaled_dot_product_attention:
                # Other lengths are attention pooling, or attention among channels.
                if all(x.shape[-2] == (tokens or x.shape[-2]) for x in args[:2]):
                    self._sdpa(name, *args, **kwargs)
            elif func is F.multi_head_attention_forward:
                self._multihead(name, *args, **kwargs)
            elif func is torch.ops.kdfast.pruned_attention.default:
                self._pruned(name, *args)
        return func(*args, **kwargs)

    def _sdpa(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if is_causal:
            raise NotImplementedError(f"{self.function}: {name} must not be causal")
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                ~attn_mask, -torch.inf
            )
        self._add(name, query, key, scale, bias=attn_mask)

    def _multihead(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        num_heads: int,
        weight: Tensor | None,
        bias: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """A call of ``nn.MultiheadAttention``, whose inputs are (N, B, C)."""
        if query is not key:
            return
        if weight is None or args[0] is not None or args[2]:
            raise NotImplementedError(
                f"{self.function}: {name} must have one projection for q, k and v, and no extra "
                "keys"
            )
        if kwargs.get("attn_mask") is not None or kwargs.get("key_padding_mask") is not None:
            raise NotImplementedError(f"{self.function}: {name} must have no mask")
        rows = slice(0, 2 * embed_dim)
        both = F.linear(query, weight[rows], None if bias is None else bias[rows])
        q, k = both.unflatten(-1, (2, num_heads, -1)).permute(2, 1, 3, 0, 4)
        self._add(name, q, k, None)

    def _pruned(self, name: str, q: Tensor, k: Tensor, v: Tensor, heads: Any, *rest: Any) -> None:
        """A call of the compiled op: q, k and v, heads, then its geometry arguments and bias."""
        cos, sin, prefix, interleaved, scale, grid, size, pad, bias, _ = rest
        if bias is not None:
            bias = bias.detach().repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
        if heads is not None:
            q, k = (x[:, heads] for x in (q, k))
            pad = None if pad is None else pad[heads]
            bias = None if bias is None else bias[:, heads]
        rope = None
        if cos is not None:
            rope = Rope(cos, sin, prefix, "interleaved" if interleaved else "half")
        window = None if grid is None else Window((grid[0], grid[1]), size, pad)
        self._add(name, q, k, scale, rope=rope, window=window, bias=bias)

    def _add(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        *,
        rope: Rope | None = None,
        window: Window | None = None,
        bias: Tensor | None = None,
    ) -> None:
        if self.batch is None and q.dim() != 4:
            raise NotImplementedError(
                f"{self.function}: {name} must have queries (B, H, N, D), got {tuple(q.shape)}; "
                "kdfast.accelerate(model) gives the attentions that it knows this shape"
            )
        if q.dim() != 4 or self.batch not in (None, q.shape[0]):
            raise NotImplementedError(
                f"{self.function}: {name} must attend over all tokens of each of the images, got "
                f"queries {tuple(q.shape)}: windows that only the model knows"
            )
        # Original indices: of EVAViT and the stand-ins; of other attentions that were pruned.
        owner = self._owner(name)
        found = (getattr(owner, attribute, None) for attribute in ("heads", "kept_heads"))
        heads = next((x for x in found if isinstance(x, list)), list(range(q.shape[1])))
        q, k = (rotated(x.detach(), rope, window) for x in (q, k))
        scale = q.shape[3] ** -0.5 if scale is None else scale
        self.layers.append(LayerAttention(name, q, k, scale, heads, bias, window))

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


@contextmanager
def eval_and_fused(model: nn.Module) -> Iterator[None]:
    """Eval mode, and fused attention in timm's modules; every flag as before afterwards."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            if isinstance(flag := getattr(module, "fused_attn", None), bool):
                undo.callback(setattr, module, "fused_attn", flag)
                setattr(module, "fused_attn", True)  # noqa: B010 - an attribute of timm's classes
        model.eval()
        yield
