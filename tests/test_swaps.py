"""Samplers: always inside the sequence, repeatable, and every allowed pair reachable."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_fast import swaps
from sire_fast.swaps import Adjacent, Blocks, Pairs, Sampler, Uniform, Window

pairs_lists = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda p: p[0] < p[1]), min_size=1, max_size=6
)
positions = st.lists(st.integers(1, 25), max_size=4, unique=True).map(sorted)
fractions = st.lists(st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]), max_size=4, unique=True).map(sorted)
counts = st.integers(1, 6)
samplers = st.one_of(
    st.builds(Uniform, counts),
    st.builds(Adjacent, st.one_of(counts, st.just("all"))),
    st.builds(Window, counts, st.integers(1, 30)),
    st.builds(Blocks, counts, st.one_of(positions, fractions)),
    st.builds(Pairs, counts, pairs_lists),
)


def allowed(sampler: Sampler, length: int) -> set[tuple[int, int]]:
    """The pairs a sampler may draw, listed one by one from its description."""
    every = set(combinations(range(length), 2))
    match sampler:
        case Adjacent():
            return {(i, j) for i, j in every if j == i + 1}
        case Window(width=width):
            return {(i, j) for i, j in every if j - i <= width}
        case Blocks(boundaries=boundaries):
            # as they are meant: 0.29 of 100 is 29, and a third of 3 is 1
            edges = [
                int(Fraction(b).limit_denominator(10**6) * length) if isinstance(b, float) else b for b in boundaries
            ]
            return {(i, j) for i, j in every if not any(i < edge <= j for edge in edges)}
        case Pairs(pairs=pairs):
            return {(i, j) for i, j in pairs if j < length}
    return every


def test_pairs_of_long_sequences() -> None:
    """A square root that is rounded to the next j would give a pair (-1, j), or (j, j)."""
    for j in (torch.arange(1, 2**16), torch.arange(2**25 - 2**16, 2**25 + 1)):
        first = swaps._triangle(j)  # the number of the pair (0, j)
        for index, i in ((first, torch.zeros_like(j)), (first + j - 1, j - 1)):
            assert torch.equal(torch.stack(swaps._triangle_pair(index)), torch.stack((i, j)))


@given(samplers, st.lists(st.integers(1, 24), min_size=1, max_size=5), st.integers(0, 2**31))
def test_draws_allowed_pairs_only(sampler: Sampler, lengths: list[int], seed: int) -> None:
    drawn = sampler(torch.tensor(lengths), len(lengths), torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.int64
    assert drawn.shape[0] == len(lengths)
    assert drawn.shape[2] == 2
    for length, row in zip(lengths, drawn.tolist(), strict=True):
        for i, j in row:
            assert 0 <= i <= j < length
            if i < j:
                assert (i, j) in allowed(sampler, length)
            elif sampler != Adjacent("all"):
                assert not allowed(sampler, length)  # nothing is exchanged only where nothing can be
    again = sampler(torch.tensor(lengths), len(lengths), torch.Generator().manual_seed(seed))
    assert torch.equal(drawn, again)


def test_a_fraction_is_as_exact_as_pythons() -> None:
    for boundary, edge in ((0.9, 9), (1, 1), (0.7, 7), (0.29, 2)):
        assert Blocks(1, [boundary])._edges(torch.tensor([10])).tolist()[0][1] == edge


@settings(max_examples=30)
@given(samplers, st.integers(1, 9))
def test_reaches_every_allowed_pair_equally(sampler: Sampler, length: int) -> None:
    """The authors' code never swaps the last element: an off-by-one that no range check notices."""
    drawn = sampler(length, 4000, torch.Generator().manual_seed(0)).flatten(0, 1)
    pairs, counts = drawn.unique(dim=0, return_counts=True)
    expected = sorted(allowed(sampler, length))
    if not expected:
        assert (drawn == 0).all()
        return
    assert [tuple(pair) for pair in pairs.tolist()] == expected
    if sampler != Adjacent("all"):
        # a uniform count deviates by its standard deviation, n p (1 - p); five of them do not happen by chance
        mean = len(drawn) / len(expected)
        assert (counts - mean).abs().max() <= 5 * mean**0.5


def test_adjacent_all_is_every_neighbour_once() -> None:
    drawn = Adjacent("all")(torch.tensor([4, 2, 1]), 3)
    assert drawn.tolist() == [[[0, 1], [1, 2], [2, 3]], [[0, 1], [0, 0], [0, 0]], [[0, 0]] * 3]
    assert Adjacent("all")(1, 2).shape == (2, 0, 2)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_share_of_a_length_is_what_it_is_on_paper(percent: int) -> None:
    """In binary 0.29 * 100 is below 29: a pair would cross the boundary."""
    lengths = torch.arange(2, 301)
    edges = Blocks(1, [float(f"0.{percent:02}")])._edges(lengths)
    assert edges[:, 1].tolist() == [percent * length // 100 for length in lengths.tolist()]


def test_half_range_keeps_the_halves_apart() -> None:
    drawn = Blocks(50, [0.5])(torch.tensor([10, 6]), 2)
    assert ((drawn[0] < 5).all(-1) | (drawn[0] >= 5).all(-1)).all()
    assert ((drawn[1] < 3).all(-1) | (drawn[1] >= 3).all(-1)).all()


@pytest.mark.parametrize(
    ("text", "sampler"),
    [
        ("none", None),
        ("uniform:4", Uniform(4)),
        ("adjacent:8", Adjacent(8)),
        ("adjacent:all", Adjacent("all")),
        ("window:2:5", Window(2, 5)),
        ("blocks:3:0.5", Blocks(3, (0.5,))),
        ("blocks:3:4,8", Blocks(3, (4, 8))),
        ("pairs:2:0-3,1-2", Pairs(2, ((1, 2), (0, 3)))),
    ],
)
def test_parse(text: str, sampler: Sampler | None) -> None:
    assert swaps.parse(text) == sampler


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uniform",
        "uniform:0",
        "uniform:x",
        "uniform:2:3",
        "window:2:0",
        "blocks:1:5,4",
        "pairs:1:2-2",
        "all",
    ],
)
def test_parse_refuses_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^swaps: .*") as caught:
        swaps.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "k: expected a whole number of at least 1 and below 2\\*\\*31, got 0"),
        (lambda: Uniform(1 << 31), "k: "),
        (lambda: Uniform(True), "k: "),
        (lambda: Uniform(1.5), "k: "),
        (lambda: Adjacent("some"), "k: "),
        (lambda: Window(1, 0), "width: "),
        (lambda: Window(1, 2.5), "width: "),  # whose pairs would be others
        (lambda: Window(1, 10**12), "width: "),
        (lambda: Blocks(1, [10**20]), "boundaries: "),
        (lambda: Pairs(1, [(0, 10**20)]), "pairs: "),
        (lambda: Blocks(1, [0.5, 3]), "boundaries: "),
        (lambda: Blocks(1, [3, 2]), "boundaries: "),
        (lambda: Blocks(1, [1.5]), "boundaries: "),
        (lambda: Blocks(1, 0.5), "boundaries: expected a list"),
        (lambda: Pairs(1, (0, 1)), "pairs: expected a list"),
        (lambda: Blocks(1, [np.float32(0.5), 3]), "boundaries: "),
        (lambda: Blocks(1, ["0.5"]), "boundaries: expected numbers, got '0.5'"),
        (lambda: Pairs(1, []), "pairs: "),
        (lambda: Pairs(1, [(0.2, 0.7)]), "pairs: expected whole numbers "),
        (lambda: Pairs(1, [(0, None)]), "pairs: expected numbers, got None"),
        (lambda: Pairs(1, [(2, 1)]), "pairs: "),
        (lambda: Uniform(1)(torch.tensor([3]), 2), "lengths: expected shape"),
    ],
)
def test_refuses(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("sampler", "same"),
    [
        (Blocks(4, np.array([0.5], np.float32)), Blocks(4, [0.5])),
        (Blocks(4, np.array([2, 5])), Blocks(4, [2, 5])),
        (Blocks(4, torch.tensor([0.25, 0.5])), Blocks(4, [0.25, 0.5])),
        (Pairs(4, np.array([[0, 4], [1, 2]])), Pairs(4, [(0, 4), (1, 2)])),
        (Pairs(4, torch.tensor([[0, 4], [1, 2]])), Pairs(4, [(0, 4), (1, 2)])),
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_torch(sampler: Sampler, same: Sampler) -> None:
    assert repr(sampler) == repr(same)
    first, second = (each(9, 3, torch.Generator().manual_seed(0)) for each in (sampler, same))
    assert torch.equal(first, second)


@pytest.mark.parametrize("sampler", [Blocks(3, [2, 5]), Blocks(3, [0.5]), Pairs(3, [(0, 4), (1, 2)])], ids=repr)
def test_a_second_draw_brings_nothing_to_the_device(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host would wait for it, and a CUDA graph cannot hold it."""
    with torch.inference_mode():
        first = sampler(9, 4, torch.Generator().manual_seed(0))

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a tensor is made of numbers")

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, refused)
    equal = pickle.loads(pickle.dumps(sampler))
    assert equal == sampler
    assert hash(equal) == hash(sampler)
    assert torch.equal(equal(9, 4, torch.Generator().manual_seed(0)), first)
