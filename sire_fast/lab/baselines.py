"""Models of sequences and sets that SIRE is compared with, each usable on its own.

All map x (T, B, I) to outputs (B, O); those with an argument `lengths` (B) take padded sequences.

    >>> import torch
    >>> model = SetTransformer(3, 16, 2, inducing=4)
    >>> model(torch.randn(7, 5, 3), torch.tensor([7, 3, 1, 5, 7])).shape
    torch.Size([5, 2])
"""

# By hand, though torch_geometric.nn.aggr has models of these names: there Deep Sets reduce by a sum alone, the Set
# Transformer has no ISAB, and both work on ragged batches, as nothing else here does.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sire_fast
from sire_fast.swaps import Sampler


def identity_rnn(inputs: int, hidden: int, **settings: Any) -> sire_fast.RNN:
    """A relu network whose state stays as it is at first: Le et al., "A simple way to initialize recurrent networks of
    rectified linear units", 2015."""
    layer = sire_fast.RNN(inputs, hidden, nonlinearity="relu", **settings)
    nn.init.eye_(layer.weight_hh_l0)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        nn.init.zeros_(layer.get_parameter(name))
    return layer


RECURRENT: dict[str, Callable[..., sire_fast.RNN | sire_fast.GRU | sire_fast.LSTM]]
RECURRENT = {"rnn": sire_fast.RNN, "irnn": identity_rnn, "gru": sire_fast.GRU, "lstm": sire_fast.LSTM}
REDUCTIONS = ("sum", "mean", "max", "prod")


class Recurrent(nn.Module):
    """A recurrent layer and a linear head on its last output; without swaps, the plain network.

    Args:
        inputs: features of an element, I.
        hidden: units of the layer, H.
        outputs: width of the result, O.
        cell: a key of RECURRENT.
        swaps, compare: see sire_fast.RNN.
        dropout: before the head.

    Attributes:
        initial: states that a forward begins with, as torch.nn's layers take them; None for zeros.
        last: those after the last forward, without its graph.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        cell: str = "gru",
        swaps: Sampler | None = None,
        compare: str = "end",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer = RECURRENT[cell](inputs, hidden, swaps=swaps, compare=compare)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, outputs)
        self.initial: Any = None
        self.last: Any = None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        _, last = self.layer(x, self.initial, lengths=lengths)
        states = last if isinstance(last, tuple) else (last,)
        detached = tuple(state.detach() for state in states)
        self.last = detached if isinstance(last, tuple) else detached[0]
        return self.head(self.dropout(states[0][-1]))


class PublishedSwaps:
    """The sampling of the authors' code (PermInvRNN.regularize in edocoh87/set_transformer): one pair of neighbours
    for the whole batch, never with the last element, which their range leaves out. Two elements or fewer have none
    (there it is an error)."""

    reach = 1

    def __call__(
        self,
        lengths: int | Tensor,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Pairs (B, 1, 2), as the samplers of sire_fast.swaps."""
        shortest = lengths if isinstance(lengths, int) else int(lengths.min())
        if shortest < 3:
            return torch.zeros(batch, 1, 2, dtype=torch.int64, device=device)
        i = int(torch.randint(shortest - 2, (), generator=generator))
        return torch.tensor([i, i + 1], device=device).expand(batch, 1, 2)


class DeepSets(nn.Module):
    """rho(reduce of phi(x)): Zaheer et al., "Deep Sets", NeurIPS 2017. A product (of tanh features) can count odd
    numbers, which a sum of few features cannot.

    Args:
        inputs, hidden, outputs: I, width of phi and rho, O.
        reduce: one of REDUCTIONS.
        dropout: before rho.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, reduce: str = "sum", dropout: float = 0.0) -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        self.reduce = reduce
        last = nn.Tanh() if reduce == "prod" else nn.Identity()
        self.phi = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), last)
        self.dropout = nn.Dropout(dropout)
        self.rho = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.rho(self.dropout(reduced(self.phi(x), self.reduce, lengths)))


def reduced(features: Tensor, reduce: str, lengths: Tensor | None = None) -> Tensor:
    """Features (T, B, H) of each element -> (B, H), over the elements inside the lengths (B)."""
    if lengths is not None:
        neutral = {"sum": 0.0, "mean": 0.0, "max": -torch.inf, "prod": 1.0}[reduce]
        features = features.masked_fill(_padding(features, lengths).T[..., None], neutral)
    if reduce == "mean":
        return features.sum(0) / (len(features) if lengths is None else lengths.to(features)[:, None])
    reductions: dict[str, Callable[..., Tensor]] = {"sum": torch.sum, "max": torch.amax, "prod": torch.prod}
    return reductions[reduce](features, 0)


def _padding(x: Tensor, lengths: Tensor) -> Tensor:
    """True behind the end of a sequence, (B, T)."""
    return torch.arange(len(x), device=x.device) >= lengths.to(x.device)[:, None]


class Attention(nn.Module):
    """MAB, multihead attention block: LayerNorm(h + relu(linear(h))) with h = LayerNorm(q + attention(q, k, k))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, q: Tensor, k: Tensor, padding: Tensor | None = None) -> Tensor:
        """q (B, Q, H), k (B, T, H), True in padding (B, T) for what is not there -> (B, Q, H)."""
        attended, _ = self.attention(q, k, k, key_padding_mask=padding, need_weights=False)
        h = self.first_norm(q + attended)
        return self.second_norm(h + self.feed_forward(h))


class SelfAttention(nn.Module):
    """SAB: every element attends to every other. x (B, T, H) -> (B, T, H)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = Attention(width, heads)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.block(x, x, padding)


class InducedAttention(nn.Module):
    """ISAB: elements attend to m learned points that attend to the elements. x (B, T, H) -> (B, T, H)."""

    def __init__(self, width: int, heads: int, m: int) -> None:
        super().__init__()
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(m, width)))
        self.gather, self.scatter = Attention(width, heads), Attention(width, heads)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        summary = self.gather(self.points.expand(len(x), -1, -1), x, padding)
        return self.scatter(x, summary)


class AttentionPooling(nn.Module):
    """PMA: a learned seed attends to the elements. x (B, T, H) -> (B, H)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.seed = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.block = Attention(width, heads)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.block(self.seed.expand(len(x), -1, -1), x, padding)[:, 0]


class SetTransformer(nn.Module):
    """Two attention blocks, attention pooling, a linear head: Lee et al., "Set Transformer", ICML 2019.

    Args:
        inputs, hidden, outputs: I, width (a multiple of heads), O.
        heads: of every attention.
        inducing: points of ISAB; 0 for SAB.
        dropout: before the head.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, heads: int = 4, inducing: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden: expected a multiple of the {heads} heads, got {hidden}")
        self.embed = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(
            InducedAttention(hidden, heads, inducing) if inducing else SelfAttention(hidden, heads) for _ in range(2)
        )
        self.pool = AttentionPooling(hidden, heads)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        padding = None if lengths is None else _padding(x, lengths)
        h = self.embed(x).transpose(0, 1)
        for block in self.blocks:
            h = block(h, padding)
        return self.head(self.dropout(self.pool(h, padding)))


class Janossy(nn.Module):
    """pi-SGD: a new random order of every sequence in training, the mean over several orders in evaluation; Murphy et
    al., "Janossy Pooling", ICLR 2019.

    Args:
        body: a model x (T, B, I) -> (B, O).
        orders: of each sequence in evaluation.
    """

    def __init__(self, body: nn.Module, orders: int = 20) -> None:
        super().__init__()
        self.body, self.orders = body, orders

    def forward(self, x: Tensor) -> Tensor:
        runs = [self.body(shuffled(x)) for _ in range(1 if self.training else self.orders)]
        return torch.stack(runs).mean(0)


def shuffled(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each of the sequences (T, B, ...) in a random order of its own."""
    order = torch.rand(x.shape[:2], generator=generator).argsort(0).to(x.device)
    return x[order, torch.arange(x.shape[1], device=x.device)]


class ImageCNN(nn.Module):
    """Two convolutions of 16 and 32 channels, each pooled by two, and 128 units. Images as sequences of rows,
    (T, B, I) with T the height and I the width."""

    def __init__(self, height: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), 128), nn.ReLU(), nn.Linear(128, outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)[:, None])


class PointEncoder(nn.Module):
    """Three layers linear(x - max over the set), each followed by relu: the encoder of the authors' point clouds (and
    of Deep Sets). (T, B, I) -> (T, B, H); another order of the points gives the same rows in that order."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, hidden) for n in (inputs, hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x - x.amax(0)).relu()
        return x


class Encoded(nn.Module):
    """An encoder of the elements before a model: model(encoder(x))."""

    def __init__(self, encoder: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.encoder, self.model = encoder, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.encoder(x))


def parameters(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in model.parameters())


def of_size(build: Callable[[int], nn.Module], wanted: int, multiple: int = 1) -> int:
    """The width, a multiple of a number, at which build(width) comes closest to the wanted number of parameters."""
    low, high = 1, 1  # in multiples; the count grows with the width
    while _count(build, high * multiple) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(build, middle * multiple) < wanted else (low, middle)
    return min((low * multiple, high * multiple), key=lambda width: abs(_count(build, width) - wanted))


def _count(build: Callable[[int], nn.Module], width: int) -> int:
    with torch.device("meta"):
        return parameters(build(width))
