"""Which positions are exchanged: samplers of swaps.

A sampler is called with the sequence length (or the lengths of the sequences) and the batch size and returns, for
every sequence, K pairs of positions (i, j) with i <= j, all inside the sequence. A pair with i == j exchanges
nothing; it stands where a sequence is too short for a real pair. All draws are uniform over the allowed pairs, with
replacement, and repeatable under a generator. Any other callable with this signature serves as a sampler too. One may
have an attribute `reach`, the largest j - i that it draws: a GPU then keeps no more than that of a variant.

    >>> import torch
    >>> Adjacent("all")(4, 1)
    tensor([[[0, 1],
             [1, 2],
             [2, 3]]])
    >>> Uniform(2)(10, 3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2, 2])
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from sire_fast.validation import has_values

Sampler = Callable[..., Tensor]

_MOST = 1 << 31  # of a number or a position: int64 holds a product of two below it


class _Drawn(ABC):
    """K draws with replacement from the allowed pairs of each sequence, which a subclass numbers from 0."""

    k: int
    _counts_numbers: ClassVar[bool] = False  # _count takes a length that is a number too: fewer operations for the same

    def count(self, length: int) -> int:
        """Number of different pairs that a sequence of this length allows; more draws than that only repeat them."""
        return int(self._count(torch.tensor([length], device="cpu"))[0])

    @abstractmethod
    def _count(self, lengths: Any) -> Any:
        """Number of allowed pairs of each sequence, (B,)."""

    @abstractmethod
    def _pair(self, index: Tensor, lengths: Any) -> tuple[Tensor, Tensor]:
        """The pair (i, j), i < j, behind each number, (B, K)."""

    def __call__(
        self,
        lengths: int | Tensor,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the swaps of one pass.

        Args:
            lengths: the length T of all sequences, or the length of each, (B,) int64.
            batch: number of sequences B.
            generator: source of randomness; torch's own if None. The numbers are drawn on its device.
            device: where the result lies; that of `lengths` if it is a tensor, else torch's default device.

        Returns:
            Pairs of positions, (B, K, 2) int64, with 0 <= i <= j < length.
        """
        number = self._counts_numbers and isinstance(lengths, int)
        if not number:
            lengths = _as_lengths(lengths, batch, device)
            device = lengths.device
        drawn_on = device if generator is None else generator.device
        # not in place, for which vmap has no rule; with None for a generator a trace takes no symbols of sizes
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        uniform = torch.rand(batch, self.k, dtype=torch.float64, device=drawn_on, **source)
        if generator is not None:
            uniform = uniform.to(device or torch.get_default_device())
        counts = self._count(lengths) if number else self._count(lengths)[:, None]
        pairs = torch.stack(self._pair((uniform * counts).long(), lengths), -1)
        if number:
            return pairs if counts > 0 else torch.zeros_like(pairs)
        return torch.where(counts[..., None] > 0, pairs, 0)


def is_sampler(given: object) -> bool:
    """Whether something can be called for pairs; a class of samplers is none."""
    return callable(given) and not isinstance(given, type)


def draw(
    sampler: Any, lengths: int | Tensor, batch: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """What anybody's sampler draws.

    Raises:
        ValueError: it is no sampler, or draws no tensor.
    """
    if not is_sampler(sampler):
        raise ValueError(f"swaps: expected a sampler (see sire_fast.swaps) or a tensor, got {sampler!r}")
    pairs = sampler(lengths, batch, generator, device)
    if not isinstance(pairs, Tensor):
        raise ValueError(f"swaps: expected a tensor from {sampler}, got a {type(pairs).__name__}")
    return pairs


@dataclass(frozen=True)
class Uniform(_Drawn):
    """k pairs, each uniform over all pairs i < j of the sequence.

    Args:
        k: number of pairs for each sequence, at least 1.
    """

    k: int
    _counts_numbers = True

    def __post_init__(self) -> None:
        _check_number("k", self.k)

    def _count(self, lengths: Any) -> Any:
        return _triangle(lengths)

    def _pair(self, index: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return _triangle_pair(index)


@dataclass(frozen=True)
class Window(_Drawn):
    """k pairs, each uniform over all pairs at most `width` positions apart.

    Args:
        k: number of pairs for each sequence, at least 1.
        width: largest j - i, at least 1.
    """

    k: int
    width: int

    def __post_init__(self) -> None:
        _check_number("k", self.k)
        _check_number("width", self.width)

    @property
    def reach(self) -> int:
        """Largest j - i."""
        return self.width

    # Pairs are numbered by j, then i: first the triangle j <= width, then `width` pairs for every further j.
    def _count(self, lengths: Tensor) -> Tensor:
        head = lengths.clamp(max=self.width + 1)
        return _triangle(head) + (lengths - head) * self.width

    def _pair(self, index: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        head = self.width * (self.width + 1) // 2
        i, j = _triangle_pair(index.clamp(max=head - 1))
        beyond = index - head
        far_j = self.width + 1 + beyond // self.width
        far_i = far_j - self.width + beyond % self.width
        return torch.where(beyond < 0, i, far_i), torch.where(beyond < 0, j, far_j)


@dataclass(frozen=True)
class Adjacent(_Drawn):
    """Swaps of neighbours, (i, i + 1): the form of the SIRE paper.

    Args:
        k: number of pairs for each sequence, drawn uniformly; or "all" for each of the T - 1 pairs once
            (shorter sequences in the batch get i == j in place of the pairs that they lack, which count as 0 in the
            mean; under the `lengths` of a layer T is that of its input, padding included).
    """

    k: int | str  # type: ignore[assignment]
    reach: ClassVar[int] = 1
    _counts_numbers = True

    def __post_init__(self) -> None:
        if self.k != "all":
            _check_number("k", self.k)

    def __call__(
        self,
        lengths: int | Tensor,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the swaps of one pass; arguments and result as for the other samplers, K = max(T) - 1 for "all"."""
        if self.k != "all":
            return super().__call__(lengths, batch, generator, device)
        if not isinstance(lengths, Tensor):
            return _neighbours(lengths, device).repeat(batch, 1, 1)
        longest = int(lengths.max())
        lengths = _as_lengths(lengths, batch, device)
        pairs = _neighbours(longest, lengths.device)
        return torch.where((pairs[:, 1] < lengths[:, None])[..., None], pairs, 0)

    def _count(self, lengths: Any) -> Any:
        return lengths - 1

    def _pair(self, index: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return index, index + 1


@dataclass(frozen=True)
class Blocks(_Drawn):
    """k pairs, each uniform over all pairs that lie in the same block of the sequence (semi-invariance).

    Args:
        k: number of pairs for each sequence, at least 1.
        boundaries: where blocks after the first begin, increasing: positions (int), or fractions of each sequence's
            length (float in (0, 1), rounded down). `Blocks(4, [0.5])` keeps the two halves of a sequence apart.
    """

    k: int
    boundaries: Sequence[int | float]

    def __post_init__(self) -> None:
        _check_number("k", self.k)
        _check_list("boundaries", self.boundaries)
        object.__setattr__(self, "boundaries", tuple(_number("boundaries", b) for b in self.boundaries))
        fractions = [b for b in self.boundaries if isinstance(b, float)]
        if fractions and (len(fractions) < len(self.boundaries) or not all(0 < b < 1 for b in fractions)):
            raise ValueError(
                f"boundaries: expected positions (int) or fractions in (0, 1), not both, got {self.boundaries}"
            )
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)) or any(
            not 0 < b < _MOST for b in self.boundaries
        ):
            raise ValueError(f"boundaries: expected increasing, above 0 and below 2**31, got {self.boundaries}")

    def _edges(self, lengths: Tensor) -> Tensor:
        """First positions of the blocks and the length, (B, blocks + 1)."""
        inner = _constant(self.boundaries, lengths)
        if inner.is_floating_point():
            # 0.29 of 100 is 28.999999999999996 in binary
            inner = (inner * lengths[:, None] * (1 + 1e-12)).long()
        inner = inner.long().expand(len(lengths), -1).minimum(lengths[:, None])
        return torch.cat((torch.zeros_like(lengths)[:, None], inner, lengths[:, None]), 1)

    def _count(self, lengths: Tensor) -> Tensor:
        return _triangle(self._edges(lengths).diff(dim=1)).sum(1)

    def _pair(self, index: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        edges = self._edges(lengths)
        upto = _triangle(edges.diff(dim=1)).cumsum(1)  # pairs in this block and those before
        block = torch.searchsorted(upto, index, right=True).clamp(max=upto.shape[1] - 1)
        before = torch.cat((torch.zeros_like(upto[:, :1]), upto), 1).gather(1, block)
        i, j = _triangle_pair(index - before)
        start = edges.gather(1, block)
        return start + i, start + j


@dataclass(frozen=True)
class Pairs(_Drawn):
    """k pairs, each uniform over those of a given list that lie inside the sequence.

    Args:
        k: number of pairs for each sequence, at least 1.
        pairs: the allowed pairs (i, j), 0 <= i < j.
    """

    k: int
    pairs: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        _check_number("k", self.k)
        _check_list("pairs", self.pairs)
        if not len(self.pairs):
            raise ValueError("pairs: expected at least one pair, got none")
        for each in self.pairs:
            _check_list("pairs", each)
        pairs = [tuple(_number("pairs", position) for position in pair) for pair in self.pairs]
        for pair in pairs:
            if len(pair) != 2 or float in map(type, pair) or not 0 <= pair[0] < pair[1] < _MOST:
                raise ValueError(f"pairs: expected whole numbers (i, j) with 0 <= i < j < 2**31, got {pair}")
        # sorted by j, the pairs inside a sequence are the first ones of the list
        ordered = sorted(pairs, key=lambda pair: pair[1])
        object.__setattr__(self, "pairs", tuple(ordered))

    def _count(self, lengths: Tensor) -> Tensor:
        last = _constant(tuple(j for _, j in self.pairs), lengths)
        return torch.searchsorted(last, lengths)

    def _pair(self, index: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        i, j = _constant(self.pairs, lengths)[index].unbind(-1)
        return i, j


_FORMS = "uniform:K, adjacent:K, adjacent:all, window:K:WIDTH, blocks:K:B1,B2,... or pairs:K:I-J,I-J,..."


def parse(text: str) -> Sampler | None:
    """The sampler that a command line names: "uniform:4", "adjacent:all", "blocks:4:0.5"; None for "none".

    Raises:
        ValueError: the text names no sampler.

    >>> parse("window:2:5")
    Window(k=2, width=5)
    """
    name, *rest = text.split(":")
    try:
        if name == "none" and not rest:
            return None
        if name == "uniform":
            (k,) = rest
            return Uniform(int(k))
        if name == "adjacent":
            (k,) = rest
            return Adjacent(k if k == "all" else int(k))
        if name == "window":
            k, width = rest
            return Window(int(k), int(width))
        if name == "blocks":
            k, edges = rest
            return Blocks(int(k), [float(e) if "." in e else int(e) for e in edges.split(",")])
        if name == "pairs":
            k, pairs = rest
            return Pairs(int(k), [(int(i), int(j)) for i, j in (pair.split("-") for pair in pairs.split(","))])
    except ValueError as error:
        reason = str(error)
        if reason.split(":")[0] in ("k", "width", "boundaries", "pairs"):
            raise ValueError(f"swaps: {text!r}: {reason}") from None
    raise ValueError(f"swaps: expected none, {_FORMS}, got {text!r}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _MOST:
        raise ValueError(f"{name}: expected a whole number of at least 1 and below 2**31, got {value!r}")


def _check_list(name: str, value: Any) -> None:
    try:
        len(value)
    except TypeError:
        raise ValueError(f"{name}: expected a list, got {value!r}") from None


def _number(name: str, value: Any) -> int | float:
    """One of Python's for one of NumPy's or torch's."""
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, Real):
        raise ValueError(f"{name}: expected numbers, got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def _as_lengths(lengths: int | Tensor, batch: int, device: torch.device | str | None) -> Tensor:
    if isinstance(lengths, Tensor):
        if lengths.shape != (batch,):
            raise ValueError(f"lengths: expected shape ({batch},), got {tuple(lengths.shape)}")
        return lengths.to(device=device, dtype=torch.int64)
    return torch.full((batch,), lengths, dtype=torch.int64, device=device)


def _constant(values: Any, like: Tensor) -> Tensor:
    """Values as a tensor on the device of another. It is kept: to bring one to a GPU at every draw would make the host
    wait, and no CUDA graph can hold it. A trace takes it as a constant of its own."""
    dtype = torch.float64 if any(isinstance(value, float) for value in values) else torch.int64
    if has_values(like):
        return _kept_constant(values, dtype, like.device)
    return torch.tensor(values, dtype=dtype, device=like.device)


@functools.lru_cache(64)
def _kept_constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _neighbours(n: int, device: torch.device | str | None) -> Tensor:
    """(0, 1), (1, 2), ... among n positions, (n - 1, 2)."""
    return torch.arange(n - 1, device=device)[:, None] + torch.arange(2, device=device)


def _triangle(n: Any) -> Any:
    """Number of pairs i < j among n positions."""
    return n * (n - 1) // 2


def _triangle_pair(index: Tensor) -> tuple[Tensor, Tensor]:
    """The pair i < j behind a number, in the order (0, 1), (0, 2), (1, 2), (0, 3), ...: index = j (j - 1) / 2 + i."""
    # the root is that of (j - 1/2)^2 for i = 0, which a double holds: for j up to 2^25 no rounding moves a pair
    j = (2 * index.double() + 0.25).sqrt().add_(0.5).long()
    return index - _triangle(j), j
