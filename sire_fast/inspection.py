"""How far from invariant a model is: what other orders of a sequence, and single swaps, do to its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from sire_fast import backends, functional
from sire_fast.layers import _MODE_CELLS, has_own_forward
from sire_fast.reference import with_variants
from sire_fast.swaps import Blocks
from sire_fast.validation import check_lengths, warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = (nn.RNN, nn.GRU, nn.LSTM)
_NOISE = 0.01  # smallest change that the picture shows, as a part of the answers' size


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds. A change is the mean of |answer - answer for the given order| over an answer's n numbers.

    Attributes:
        answer: for the given order, (B, n).
        changes: in N random orders, (N, B).
        worst: in the worst order found, (B).
        worst_order: that order, (B, T): the position in the given sequence of what stands at each step.
        heat_map: with positions i and j exchanged, mean over the sequences that hold both; (T, T), symmetric, NaN
            where no sequence does.
    """

    answer: Tensor
    changes: Tensor
    worst: Tensor
    worst_order: Tensor
    heat_map: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean change over the random orders, (B): the order sensitivity."""
        return self.changes.mean(0)

    @property
    def max(self) -> Tensor:
        """Largest change in the random orders, (B)."""
        return self.changes.amax(0)

    @property
    def size(self) -> Tensor:
        """Mean |number| of the answer, (B): what divides a change makes it relative."""
        return self.answer.abs().mean(-1)

    def draw(self) -> Figure:
        """The heat map, and the changes of every sequence, as a picture; needs matplotlib (the extra "train").

        Both scales end at the largest change, but not below 1 % of the answers' size: rounding is no pattern.

        Example:
            >>> found = inspect(lambda x: x[0], torch.randn(5, 4, 3))
            >>> found.draw().savefig("order.png")  # doctest: +SKIP
        """
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator

        size = self.size.mean().item()

        def top(changes: Tensor) -> float:
            return max(changes.nan_to_num().max().item(), _NOISE * size) or 1.0

        figure = Figure(figsize=(10.5, 4.8), layout=ConstrainedLayoutEngine(wspace=0.06))
        left, right = figure.subplots(1, 2)
        shades = {"vmin": 0, "vmax": top(self.heat_map), "cmap": "magma"}
        image = left.imshow(self.heat_map.cpu().numpy(), origin="lower", interpolation="nearest", **shades)
        figure.colorbar(image, ax=left, label="mean |change of the answer|")
        left.set(xlabel="position i", ylabel="position j")
        left.set_title("One swap: i and j exchanged", loc="left")

        ranked = self.worst.argsort(descending=True)
        rank = range(1, len(ranked) + 1)
        for values, label, style in (
            (self.worst, "worst order found", {"color": "#d1495b", "markersize": 8, "fillstyle": "none"}),
            (self.max, f"largest of {len(self.changes)} random orders", {"color": "#edae49", "markersize": 5}),
            (self.mean, f"mean of {len(self.changes)} random orders", {"color": "#00798c", "markersize": 5}),
        ):
            right.plot(rank, values[ranked].cpu().numpy(), "o", label=label, clip_on=False, **style)
        right.set(xlabel="sequence, the most sensitive first", ylabel="|change of the answer|")
        right.set_title(f"Whole orders; mean |answer|: {size:.3g}", loc="left")
        right.set_ylim(0, 1.05 * top(self.worst))
        right.grid(alpha=0.25)
        right.spines[["top", "right"]].set_visible(False)
        right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        for axis in (left.xaxis, left.yaxis, right.xaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return figure


@torch.no_grad()
def inspect(
    model: Callable[..., Any],
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    batch_first: bool = False,
    through: Callable[[Any], Tensor] | None = None,
    boundaries: Sequence[int | float] = (),
    orders: int = 20,
    generator: torch.Generator | None = None,
    rows: int = 1024,
    report: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Tell how far from invariant to the order of its input a model is.

    Its answer for each sequence is compared with that for random orders of it, for the worst order that is found,
    and for the sequence with any two positions exchanged. The search starts from the worst of the random orders and
    up to T - 1 times exchanges the neighbours that move the answer farthest away, as long as there are such.

    Args:
        model: a module or function of sequences that gives an answer (B, ...). It is called as model(x), or
            as model(x, lengths) where there are lengths, with x in the layout of x and with other batch sizes too,
            and must treat sequences independently of each other. A recurrent layer, torch's or sire_fast's, is asked
            for its output for the whole sequences, (B, D).
        x: sequences, (T, B, ...), or (B, T, ...) with batch_first.
        lengths: length of every sequence, 1 <= length <= T, (B) int64; what lies beyond keeps its place.
        batch_first: x has the batch in front.
        through: makes the answer of what the model gives: a head, or a choice among several results.
        boundaries: where blocks of the sequence begin, as for sire_fast.swaps.Blocks, if the answer is to ignore the
            order inside blocks only. Orders stay inside the blocks; the heat map shows every pair.
        orders: number N of random orders.
        generator: of the random orders; by default one with seed 0, so that the same call finds the same.
        rows: sequences that are run at once, which bounds the memory; those of x are always run together.
        report: is told the progress, report(done, total), in swaps and orders.

    Returns:
        An Inspection; its `draw()` makes a picture.

    Raises:
        ValueError: an argument has another shape or value than expected, or the model gives no finite answers.

    Sequences without an order to change, of one step or in blocks of one, are told by a warning.

    Modules run in evaluation mode, without gradients, and get their modes back. Torch's own random numbers are left
    alone. A layer runs on the fused operator where a kernel serves it; whatever else runs on swapped copies of x, about
    3/2 T^2 of them.

    Example:
        >>> layer, head = nn.GRU(3, 8), nn.Linear(8, 1)
        >>> found = inspect(layer, torch.randn(6, 4, 3), through=head)
        >>> found.mean.shape, found.heat_map.shape
        (torch.Size([4]), torch.Size([6, 6]))
        >>> bool((found.worst >= found.max).all())
        True
    """
    _check(model, x, lengths, batch_first, orders, rows)
    sequences = x.transpose(0, 1) if batch_first else x
    steps, batch = sequences.shape[:2]
    given = torch.full((batch,), steps, device=x.device) if lengths is None else lengths
    position = torch.arange(steps, device=x.device)
    inside = position < given[:, None]  # (B, T)
    ends = Blocks(1, boundaries)._edges(given)[:, 1:]
    block = (position[:, None] >= ends[:, None]).sum(-1)  # (B, T); what lies beyond the length is a block of its own
    allowed = (block[:, 1:] == block[:, :-1]) & inside[:, 1:]  # neighbours (B, T - 1)
    if not allowed.any():
        warn(f"inspect: nothing to exchange in these sequences of up to {steps} steps, or in their blocks")
    with evaluating(model, through):
        searched = orders + (steps - 1) ** 2
        total = searched + steps * (steps - 1) // 2
        changes = _Changes(model, sequences, lengths, batch_first, through, rows, report, total)

        drawn = _random_orders(orders, block, inside, generator or torch.Generator().manual_seed(0))
        itself = position.new_zeros(batch, 1, 2)
        of_orders = torch.stack([changes(_reorder(sequences, order), itself)[:, 0] for order in drawn])
        worst, worst_order = _climb(changes, sequences, of_orders, drawn, allowed)
        changes.done = searched  # it may have ended early
        heat_map = _heat_map(changes, sequences, inside)
    return Inspection(changes.answer, of_orders, worst, worst_order, heat_map)


class _Changes:
    """The change of a model's answer by swaps, run in chunks: (x (T, B, ...), pairs (B, K, 2)) -> (B, K)."""

    def __init__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        lengths: Tensor | None,
        batch_first: bool,
        through: Callable[[Any], Tensor] | None,
        rows: int,
        report: Callable[[int, int], object] | None,
        total: int,
    ) -> None:
        self.model, self.lengths, self.batch_first, self.through = model, lengths, batch_first, through
        self.chunk = max(1, rows // x.shape[1])
        self.fused = _has_kernel(model)
        self.report, self.done, self.total = report, 0, total
        self.answer = self._answers(x, torch.zeros(x.shape[1], 1, 2, dtype=torch.int64, device=x.device))[:, 0]
        if not self.answer.isfinite().all():
            raise ValueError("model: expected finite answers, got nan or inf")

    def __call__(self, x: Tensor, pairs: Tensor) -> Tensor:
        found = []
        for part in pairs.split(self.chunk, 1):
            found.append((self._answers(x, part) - self.answer[:, None]).abs().mean(-1))
            self.done += part.shape[1]
            if self.report:
                self.report(self.done, self.total)
        return torch.cat(found, 1)

    def _answers(self, x: Tensor, pairs: Tensor) -> Tensor:
        """The answers for every variant, (B, K, n)."""
        batch, n_variants, _ = pairs.shape
        found = self._fused(x, pairs) if self.fused else self._stacked(x, pairs)
        answers = found if self.through is None else self.through(found)
        if not isinstance(answers, Tensor) or answers.dim() == 0 or len(answers) != batch * n_variants:
            got = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
            raise ValueError(f"model: expected answers of shape ({batch * n_variants}, ...), got {got}; see `through`")
        wide = torch.promote_types(answers.dtype, torch.float32)
        return answers.to(wide).reshape(batch, n_variants, -1)

    def _fused(self, x: Tensor, pairs: Tensor) -> Tensor:
        """A layer's last output for every variant, (B * K, H)."""
        layer: Any = self.model
        w_ih, w_hh, *biases = (getattr(layer, name) for name in layer._all_weights[0])
        b_ih, b_hh = biases or (None, None)
        h0 = w_hh.new_zeros(x.shape[1], layer.hidden_size)
        c0 = h0 if layer.mode == "LSTM" else None
        options = {"swaps": pairs, "lengths": self.lengths, "w_ih": w_ih, "b_ih": b_ih}
        return functional.swap_rnn(_MODE_CELLS[layer.mode], x, w_hh, b_hh, h0, c0, **options).variants.flatten(0, 1)

    def _stacked(self, x: Tensor, pairs: Tensor) -> Any:
        """What the model gives for every variant as a sequence of a larger batch."""
        variants: Any = with_variants(x, pairs)[:, :, 1:].flatten(1, 2)
        lengths = None if self.lengths is None else self.lengths.repeat_interleave(pairs.shape[1])
        if self.batch_first:
            variants = variants.transpose(0, 1)
        if not isinstance(self.model, _LAYERS):
            return self.model(variants) if lengths is None else self.model(variants, lengths)
        if lengths is not None:
            variants = pack_padded_sequence(variants, lengths.cpu(), self.batch_first, enforce_sorted=False)
        _, last = self.model(variants)
        h_n = last[0] if self.model.mode == "LSTM" else last  # (layers * directions, B * K, D)
        return torch.cat(h_n[-2 if self.model.bidirectional else -1 :].unbind(0), -1)


def _has_kernel(model: Any) -> bool:
    """Whether the operator computes what the model does, on a kernel."""
    if not isinstance(model, _LAYERS) or has_own_forward(model):
        return False
    if model._forward_pre_hooks or model._forward_hooks:  # which may change anything
        return False
    if model.num_layers > 1 or model.bidirectional or model.proj_size:
        return False
    weight = model.weight_hh_l0
    call = {"dtype": weight.dtype, "device": weight.device, "hidden_size": model.hidden_size}
    return not backends.why_no_kernel(cell=_MODE_CELLS[model.mode], **call)


def _random_orders(n: int, block: Tensor, inside: Tensor, generator: torch.Generator) -> Tensor:
    """Orders (n, B, T) that keep every position in its block, and what is not inside where it is."""
    uniform = torch.rand(n, *block.shape, generator=generator, dtype=torch.float64, device=generator.device)
    place = torch.arange(block.shape[1], device=block.device) / block.shape[1]
    # sorting by block number plus a fraction permutes inside the blocks
    return (block + torch.where(inside, uniform.to(block.device), place)).argsort(-1)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Sequences (T, B, ...) in orders (B, T)."""
    return x[order.T, torch.arange(len(order), device=x.device)]


def _climb(changes: _Changes, x: Tensor, of_orders: Tensor, drawn: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The worst change (B) and its order (B, T), from the worst of the orders drawn on, by swaps of neighbours."""
    worst, index = of_orders.max(0)
    row = torch.arange(len(worst), device=x.device)
    order = drawn[index, row]
    i = torch.arange(len(x) - 1, device=x.device)
    pairs = torch.where(allowed[..., None], torch.stack((i, i + 1), -1), 0)  # (B, T - 1, 2)
    for _ in range(len(x) - 1):
        found, best = torch.where(allowed, changes(_reorder(x, order), pairs), 0).max(1)
        better = found > worst
        if not better.any():
            break
        swap = torch.where(better[:, None], pairs[row, best], 0)
        order = with_variants(order.T, swap[:, None])[:, :, 1].T
        worst = torch.where(better, found, worst)
    return worst, order


def _heat_map(changes: _Changes, x: Tensor, inside: Tensor) -> Tensor:
    """Mean change by each swap over the sequences that hold both positions, (T, T)."""
    steps = len(x)
    sums = changes.answer.new_zeros(steps, steps)
    for j in range(1, steps):
        pairs = torch.stack((torch.arange(j), torch.full((j,), j)), -1).to(x.device)
        held = inside[:, j, None]
        change = changes(x, torch.where(held[..., None], pairs, 0))
        sums[:j, j] = torch.where(held, change, 0).sum(0)
    held = inside.to(sums.dtype)
    return (sums + sums.T) / (held.T @ held)


def _check(model: Any, x: Tensor, lengths: Tensor | None, batch_first: bool, orders: int, rows: int) -> None:
    """Raise a ValueError that names the first argument that does not fit."""
    if not callable(model):
        raise ValueError(f"model: expected a module or a function, got {model!r}")
    layout = "(B, T, ...)" if batch_first else "(T, B, ...)"
    is_layer = isinstance(model, _LAYERS)
    if x.dim() < 2 or 0 in x.shape[:2] or (is_layer and x.dim() != 3):
        expected = layout.replace("...", "I") if is_layer else layout
        raise ValueError(f"x: expected {expected} with at least one step and one sequence, got {tuple(x.shape)}")
    if is_layer and model.batch_first != batch_first:
        raise ValueError(f"batch_first: expected {model.batch_first}, which the layer has, got {batch_first}")
    batch, steps = x.shape[:2] if batch_first else x.shape[1::-1]
    if lengths is not None:
        check_lengths(steps, batch, lengths)
        check_lengths(steps, batch, lengths.cpu())
        if lengths.device != x.device:
            raise ValueError(f"lengths: expected on {x.device}, the device of x, got {lengths.device}")
    for name, value in (("orders", orders), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


@contextmanager
def evaluating(*parts: object) -> Iterator[None]:
    """Modules, and all inside them, in evaluation mode until the block ends."""
    roots = [part for part in parts if isinstance(part, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, training in modes:  # a module comes before those inside it
            module.train(training)
