# SPDX-License-Identifier: Apache-2.0
"""Runs a model on data and watches its heads. B batch, H heads, N tokens, D head dim."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from kdfast.machine.ranks import Ranks
from kdfast.machine.turns import in_turns
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.entropy import call_entropy
from kdfast.pruning.inputs import Inputs, batches_of, model_inputs, outputs

Loss = Callable[[Any, Any], Tensor]
# Between the seeds of two batches: far more than between those that people choose.
_STRIDE = 0x9E3779B97F4A7C15


class Observer(Protocol):
    """Scores images."""

    def attach(self) -> list[RemovableHandle]:
        """Hooks to have in place while ``run`` is called."""

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        """Sums of the images' scores, (H,) fp64 per block.

        Args:
            images: What goes into the model.
            batch: Where they are from.
            number: Of the batch, among those of all processes.
        """


def observe(
    function: str,
    anatomy: Anatomy,
    observer: Observer,
    data: Iterable[Any],
    batches: int | None,
    progress: bool,
    lead: Callable[[Ranks], None] | None = None,
) -> tuple[list[Tensor], dict[str, int]]:
    """Mean of the observer's scores over the images of all processes, and how many there were.

    The scores of batches are added up in the order of ``in_turns``.

    Args:
        function: Name of the caller, for messages.
        anatomy: The model to run; it is left as it was, also when an error is raised.
        observer: Adds up what it sees in this model.
        data: As in ``head_scores``.
        batches: Use at most so many; None: all.
        progress: Show a progress bar on a terminal.
        lead: Called in all of several processes between the first batch and the others.

    Raises:
        TypeError: A batch is not of a known kind.
        ValueError: There is no batch, one holds no image, or a score is not finite.
        PeerError: Another process failed.
    """
    ranks = Ranks.here()
    device = next(anatomy.model.parameters()).device
    data = batches_of(data)
    handles: list[RemovableHandle] = []

    def score(batch: Any, number: int) -> tuple[list[Tensor], int]:
        batch = moved(batch, device)
        images = model_inputs(function, anatomy.model, batch)
        rows = observer.run(images, batch, number)
        return rows if ranks.world == 1 else [row.cpu() for row in rows], len(images)

    bar = tqdm(
        total=_total(data, batches, ranks),
        desc=function.replace("_", " "),
        unit="batch",
        disable=None if progress and ranks.main else True,
    )
    totals: list[Tensor] = []
    count = images = 0
    with bar, anatomy.running(), frozen_eval(anatomy.model):
        try:
            handles += observer.attach()
            first = None if lead is None else partial(lead, ranks)
            for rows, size in in_turns(ranks, data, score, limit=batches, lead=first):
                totals = [a + b for a, b in zip(totals, rows, strict=True)] if totals else rows
                _check_finite(function, totals, count)
                count, images = count + 1, images + size
                bar.set_postfix(images=images, refresh=False)
                bar.update()
        finally:
            for handle in handles:
                handle.remove()
    if count == 0:
        raise ValueError(f"{function}: data must give at least one batch, got none")
    return [(row / images).cpu() for row in totals], {"batches": count, "images": images}


def _total(data: Iterable[Any], batches: int | None, ranks: Ranks) -> int | None:
    """Batches that there will be in all processes; None where that is not known before."""
    lengths = ranks.shared(lambda: len(data) if isinstance(data, Sized) else None)
    if None in lengths:
        return batches
    total = sum(length or 0 for length in lengths)
    return total if batches is None else min(total, batches)


class ContextObserver:
    """Taylor and gradient scores from the input of every site's projection.

    One forward and one backward a batch give the scores of all slices of all sites: the gradient
    at the projections' inputs is a by-product of the backward, whatever their number.
    """

    def __init__(
        self, sites: Sequence[Site], model: nn.Module, method: str, loss: Loss | None, seed: int
    ) -> None:
        """Set up; without a loss each batch has a random projection, by the seed and its number."""
        self.sites, self.model, self.method = sites, model, method
        self.loss, self.seed = loss, seed
        self._contexts: dict[int, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        return [
            site.projection.register_forward_pre_hook(partial(self._keep, index))
            for index, site in enumerate(self.sites)
        ]

    def _keep(self, index: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0]
        if not context.requires_grad:
            # The first block: all parameters are frozen, so the graph starts here.
            context = context.detach().requires_grad_()
        self._contexts[index] = context
        return context, *args[1:]

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        self._contexts.clear()
        loss_of = self.loss or RandomProjection(self.seed, number)
        with torch.inference_mode(False), torch.enable_grad():
            loss = loss_of(outputs(self.model, images), batch)
            _check_loss(loss)
            contexts = [self._contexts.pop(index) for index in sorted(self._contexts)]
            grads = torch.autograd.grad(loss, contexts)
        # The loss is a mean over images: times B, the gradient is that of each image's own loss.
        return [
            len(images) * self._scores(site, c.detach(), len(images) * g)
            for site, c, g in zip(self.sites, contexts, grads, strict=True)
        ]

    def _scores(self, site: Site, context: Tensor, grad: Tensor) -> Tensor:
        """(H,): mean over images and tokens; context and grad are (B, N, H * D), or windows'."""
        context, grad = (split(x.double(), site) for x in (context, grad))
        if self.method == "taylor":
            change = (context * grad).sum(-1).abs()
        else:
            change = grad.norm(dim=-1)
        return change.mean((0, 1))


class MeanObserver:
    """Mean over tokens of the input of every site's projection, (H * D,); pads do not count."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.adapter, self.model = anatomy.adapter, anatomy.model
        self.sites = (*anatomy.attentions, *anatomy.mlps)
        self._pads: dict[int, Tensor | None] = {}
        self._rows: dict[int, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        handles = []
        for index, site in enumerate(self.sites):
            enter, keep = partial(self._enter, index), partial(self._keep, index)
            handles.append(site.module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(site.projection.register_forward_pre_hook(keep))
        return handles

    def _enter(
        self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._pads[index] = self.adapter.pads(self.sites[index], args, kwargs)

    def _keep(self, index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._rows[index] = tokens_of(args[0], self._pads[index]).double().mean(0)

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        self._rows.clear()
        with torch.no_grad():
            outputs(self.model, images)
        return [len(images) * self._rows[index] for index in sorted(self._rows)]


class EntropyObserver:
    """Entropy of the attention rows, as a score that grows with importance."""

    def __init__(self, anatomy: Anatomy, important: str, unit: str) -> None:
        self.adapter, self.model, self.sites = anatomy.adapter, anatomy.model, anatomy.attentions
        self.important, self.unit = important, unit
        self._rows: dict[int, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        return [
            site.module.register_forward_hook(partial(self._score, block), with_kwargs=True)
            for block, site in enumerate(self.sites)
        ]

    def _score(
        self,
        block: int,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        site = self.sites[block]
        if not site.held:
            self._rows[block] = next(self.model.parameters()).new_zeros(0, dtype=torch.float64)
            return
        call = self.adapter.call(site, args, kwargs, output)
        entropy, limit = (x.double() for x in call_entropy(call))
        value = limit - entropy if self.important == "low" else entropy
        if self.unit == "share":
            # A token that sees one key has limit 0 and entropy 0: its share counts as 0.
            value = value / torch.where(limit > 0, limit, 1.0)
        # Two softmaxes of one head (differential attention) count as one, by their mean.
        value = value.clamp_min(0).unflatten(1, (len(site.held), -1))
        self._rows[block] = value.mean((0, 2, 3))

    def run(self, images: Tensor | Inputs, batch: Any, number: int) -> list[Tensor]:
        self._rows.clear()
        with torch.no_grad():
            outputs(self.model, images)
        return [len(images) * self._rows[block] for block in sorted(self._rows)]


class RandomProjection:
    """Label-free loss whose gradients measure how much the output moves.

    ``mean_b <u_b, f_b / rms(f_b)>`` with random signs u and the root mean square of every channel,
    a constant, so that no channel dominates by its size. Over u, the mean square of the gradient
    along a change of the context is the squared change of the scaled output, to first order.
    """

    def __init__(self, seed: int, number: int = 0) -> None:
        """The projection of a batch, by its number; that of the first has the seed itself."""
        self.generator = torch.Generator().manual_seed((seed + number * _STRIDE) % 2**63)

    def __call__(self, output: Any, batch: Any) -> Tensor:
        """Scalar loss of an output (B, C, ...) or (B, C), or of one that holds such a tensor."""
        output = main_output(output)
        if not isinstance(output, Tensor) or output.dim() < 2:
            got = type(output).__name__
            raise TypeError(
                f"head_scores: without a loss the output must be (B, C, ...), got {got}"
            )
        signs = torch.randint(0, 2, output.shape, generator=self.generator)
        values = output.float() if output.dtype != torch.float64 else output
        square = values.detach().square()
        everything = tuple(range(1, output.dim()))
        channel = everything[1:] or everything
        # A channel that is nearly zero everywhere must not be blown up either.
        floor = 1e-6 * square.mean(everything, keepdim=True)
        rms = square.mean(channel, keepdim=True).maximum(floor).sqrt()
        loss: Tensor = ((2 * signs - 1).to(values) * values / rms).sum() / len(output)
        return loss


def main_output(output: Any) -> Any:
    """The main tensor of a Hugging Face output, logits or features, with channels second."""
    if not isinstance(output, Mapping):
        return output
    for name in ("logits", "image_embeds", "last_hidden_state"):
        tensor = output.get(name)
        if isinstance(tensor, Tensor):
            return tensor.transpose(1, -1) if tensor.dim() == 3 else tensor
    return output


def split(context: Tensor, site: Site) -> Tensor:
    """(B, ..., H * D) to (B, N, H, D) of a site; all dimensions between are tokens."""
    return context.unflatten(-1, (len(site.held), site.size)).flatten(1, -3)


def tokens_of(x: Tensor, pads: Tensor | None) -> Tensor:
    """Rows (T, D) of the input or output of a projection, without pads."""
    rows = x.detach().flatten(0, -2)
    return rows if pads is None else rows[~pads.flatten()]


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Context in eval mode and without parameter gradients; flags are put back at the end."""
    training = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, was in training:
            module.training = was
        for parameter, was in flags:
            parameter.requires_grad_(was)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [moved(value, device) for value in batch]
    return batch


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"head_scores: loss must return a scalar tensor, got {got}")
    if not torch.isfinite(loss):
        raise ValueError(f"head_scores: loss must be finite, got {loss.item()}")
    if not loss.requires_grad:
        raise ValueError("head_scores: loss must depend on the model's output, got a constant")


def _check_finite(function: str, totals: list[Tensor], batch: int) -> None:
    for block, row in enumerate(totals):
        if not torch.isfinite(row).all():
            raise ValueError(
                f"{function}: scores must be finite, got {row.tolist()} in block {block} after "
                f"batch {batch}"
            )
