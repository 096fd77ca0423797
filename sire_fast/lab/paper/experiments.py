"""Which trainings make a figure or a table, and what has been published of it.

The figures of the paper are pictures without numbers, so that only its tables are quoted. Protocols: sum, range,
variance, unique sum and unique count as Murphy et al., "Janossy Pooling", ICLR 2019, with fewer sequences and steps,
but in figure2-long; the rest of the settings is ours, since the paper's are not public. Weights, learning rates and
sizes of training sets were chosen by validation under a seed that no result has; where a weight decides, several are
shown. Where a case has choices it is the experiment that chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import Setting
from sire_fast.lab.paper.trials import Trial

Fields = dict[str, Any]  # of a Trial

QUICK_SETTINGS = 2  # of an experiment in the quick preset
CHOOSING_SEED = 1000


class Case(NamedTuple):
    """A row of a table: what is learned, how, and the trial, without its seed.

    Attributes:
        choices: trials of which the one that validates best under a seed of its own, after a part of its steps, takes
            the place of `trial`; none for `trial` itself.
        seeds: the most that this row gets.
        decides: the part of the steps that decides about a choice.
    """

    setting: str
    method: str
    trial: Trial
    choices: tuple[Trial, ...] = ()
    seeds: int | None = None
    decides: float = 1 / 8

    def choosing(self) -> tuple[Trial, ...]:
        """What decides about the choices."""
        part: Fields = {"seed": CHOOSING_SEED, "seconds": 0.0, "patience": 0, "records": 10}
        return tuple(replace(trial, steps=math.ceil(trial.steps * self.decides), **part) for trial in self.choices)


def _choices(trial: Trial, **values: tuple[Any, ...]) -> tuple[Trial, ...]:
    """A trial with every combination of values; none if there is nothing to choose from."""
    if not values:
        return ()
    return tuple(replace(trial, **dict(zip(values, each, strict=True))) for each in itertools.product(*values.values()))


@dataclass(frozen=True)
class Experiment:
    """A figure or a table.

    Attributes:
        about: its question.
        cases: its rows.
        picture: "test" (curves over test lengths, or dots where there are few), "dots" (at the first of `at`), "epochs"
            or "seconds" (validation against them, mean over the seeds) or "heat map".
        published: (setting, method) -> accuracy, from the paper, on the data named
        published_on: how the names of such data begin. A gap to other data would say nothing.
        at: the test lengths that overviews tell, where there are several; of classes also how many seeds have an
            accuracy of at least 0.99 at the last of them.
        targets: validation accuracies to which epochs and seconds are told.
        seeds: their number in the full preset.
    """

    about: str
    cases: Callable[[], Iterator[Case]]
    picture: str = "test"
    published: dict[tuple[str, str], float] = field(default_factory=dict)
    published_on: str = ""
    at: tuple[str, ...] = ()
    targets: tuple[float, ...] = ()
    seeds: int = 5


def quick(cases: list[Case]) -> list[Case]:
    """The first settings, so small that they take seconds: to see that everything runs."""
    settings = list(dict.fromkeys(case.setting for case in cases))[:QUICK_SETTINGS]
    return [
        case._replace(trial=_small(case.trial), choices=tuple(map(_small, case.choices[:2])))
        for case in cases
        if case.setting in settings
    ]


def _small(trial: Trial) -> Trial:
    return replace(
        trial,
        steps=10,
        seconds=0.0,
        batch=16,
        hidden=8,
        examples=min(trial.examples, 100),
        train_lengths=tuple(min(n, 100) for n in trial.train_lengths[:9]),
        test_lengths=trial.test_lengths[:2],
    )


def _recurrent(cell: str, name: str) -> dict[str, Fields]:
    """A recurrent network without penalty, shuffled, and with SIRE on its states: in both compares, and with the
    sampling and weight of the authors' code."""
    base = {"model": cell, "cell": cell}
    return {
        name: base,
        f"{name}, shuffled": base | {"fresh": True},
        f"{name}, SIRE at the end": base | {"swaps": "uniform:4"},
        f"{name}, SIRE at the swap": base | {"swaps": "adjacent:all", "compare": "swap"},
        f"{name}, SIRE as published": base | {"swaps": "published", "compare": "swap", "weight": 1.0},
    }


# a network of numbers can shrink its states, not its answers
_ON_OUTPUTS: Fields = {"swaps": "uniform:4", "through": True, "weight": 10.0}
_TWO_TO_TEN = tuple(range(2, 11))
_DEEP_SETS = {f"DeepSets ({reduce})": {"model": f"deepsets-{reduce}"} for reduce in ("sum", "mean", "max")}
_SET_TRANSFORMERS = {"Set Transformer (SAB)": {"model": "sab"}, "Set Transformer (ISAB)": {"model": "isab"}}
_TO_100 = (5, 10, 20, 30, 40, 50, 75, 100)


def _figure1() -> Iterator[Case]:
    methods = _recurrent("gru", "GRU") | _DEEP_SETS | {"DeepSets (product)": {"model": "deepsets-prod"}}
    for examples in (40, 100_000):
        for hidden in (3, 8, 100):
            common: Fields = {"hidden": hidden, "examples": examples, "steps": 6000, "seconds": 8.0, "lr": 3e-3}
            lengths: Fields = {"test_lengths": (10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200)}
            for method, changes in methods.items():
                setting = f"H = {hidden}, {examples} sequences"
                yield Case(setting, method, Trial("parity", **common, **lengths, **changes))


def _figure2() -> Iterator[Case]:
    lstm = {"model": "lstm", "cell": "lstm"}
    methods = _recurrent("lstm", "LSTM") | {
        "LSTM, SIRE on outputs": lstm | _ON_OUTPUTS,
        "LSTM, SIRE on outputs, shuffled": lstm | _ON_OUTPUTS | {"fresh": True},
        "DeepSets (sum)": {"model": "deepsets-sum"},
    }
    janossy = {"LSTM, 20 orders (Janossy)": {"model": "janossy"}}
    common: Fields = {"cell": "lstm", "hidden": 50, "examples": 10_000, "lr": 2e-3, "steps": 3000, "seconds": 6.0}
    for name, n in (("sum", 5), ("range", 5), ("variance", 10), ("unique-sum", 10), ("unique-count", 10), ("max", 9)):
        for method, changes in (methods | janossy).items():
            lengths: Fields = {"train_lengths": (n,), "test_lengths": (n,)}
            yield Case(f"{name} of {n}", method, Trial(name, **(common | lengths | changes)))
    for name in ("sum", "range", "variance"):
        for method, changes in methods.items():
            lengths = {"train_lengths": _TWO_TO_TEN, "test_lengths": _TO_100}
            yield Case(f"{name} of 2 to 10", method, Trial(name, **(common | lengths | changes)))


def _figure2_long() -> Iterator[Case]:
    """As Murphy et al.; what is measured is the best of the 50 lines of the history, without an early stop."""
    lstm = {"model": "lstm"}
    methods: dict[str, Fields] = {
        "LSTM, shuffled": lstm | {"fresh": True},
        "LSTM, SIRE as published": lstm | {"swaps": "published", "compare": "swap", "weight": 1.0},
        "LSTM, SIRE on outputs": lstm | _ON_OUTPUTS,
        "LSTM, SIRE on outputs, shuffled": lstm | _ON_OUTPUTS | {"fresh": True},
        "DeepSets (sum)": {"model": "deepsets-sum"},
        "LSTM, 20 orders (Janossy)": {"model": "janossy"},
    }
    common: Fields = {"cell": "lstm", "hidden": 50, "examples": 100_000, "batch": 128, "patience": 50}
    budgets: Fields = {"steps": 300 * 100_000 // 128, "seconds": 300.0}
    for name, n in (("sum", 5), ("range", 5), ("variance", 10)):
        for method, changes in methods.items():
            trial = Trial(name, train_lengths=(n,), test_lengths=(n,), **common, **budgets, **changes)
            yield Case(f"{name} of {n}", method, trial, _choices(trial, lr=(1e-3, 3e-4, 1e-4)))


def _warm_up() -> Iterator[Case]:
    """Twice the steps of figure 1: an unlucky network stands still for 4000, and has to depend on order to move."""
    methods = {name: changes for name, changes in _recurrent("gru", "GRU").items() if name != "GRU, shuffled"}
    common: Fields = {"hidden": 3, "examples": 100_000, "steps": 12_000, "lr": 3e-3, "test_lengths": (10, 50, 100)}
    for method, changes in methods.items():
        for warm_up in (0, 3000, 10_000) if "SIRE" in method else (0,):
            name = f"{method}, whole weight from step {warm_up}" if warm_up else method
            yield Case("H = 3, 100000 sequences", name, Trial("parity", **common, **changes, warm_up=warm_up))


def _half_range() -> Iterator[Case]:
    methods: dict[str, Fields] = {"GRU": {}, "GRU, shuffled inside the halves": {"fresh": True}}
    for what, through, weights in (("states", False, (0.1, 1.0)), ("outputs", True, (1.0, 10.0, 100.0))):
        for weight in weights:
            sire = {"through": through, "weight": weight}
            methods[f"SIRE on {what} inside the halves, weight {weight:g}"] = sire | {"swaps": "blocks:4:0.5"}
            methods[f"SIRE on {what} anywhere, weight {weight:g}"] = sire | {"swaps": "uniform:4"}
    common: Fields = {"hidden": 64, "examples": 10_000, "lr": 2e-3, "steps": 4000, "seconds": 10.0}
    for method, changes in methods.items():
        yield Case("10000 sequences of 4 to 20", method, Trial("half-range", **common, **changes))


def _swaps() -> Iterator[Case]:
    end = [f"uniform:{k}" for k in (1, 2, 4, 8, 16)] + ["adaptive:uniform:4"]
    swap = [f"adjacent:{k}" for k in (1, 2, 4, 8, "all")] + ["adaptive:adjacent:4"]
    plain: dict[str, Fields] = {"none": {}, "none, shuffled": {"fresh": True}}
    at_the_swap = {f"{s} at the swap": {"swaps": s, "compare": "swap"} for s in swap}
    problems: list[tuple[str, int, Fields]] = [
        ("parity", 10, {"hidden": 32, "examples": 40, "lr": 3e-3, "seconds": 4.0}),
        ("range", 10, {"hidden": 64, "examples": 10_000, "lr": 2e-3, "seconds": 6.0}),
        ("range", 50, {"hidden": 64, "examples": 10_000, "lr": 2e-3, "seconds": 15.0}),
    ]
    for problem, n, common in problems:
        outputs = _ON_OUTPUTS if problem == "range" else {}
        at_the_end = {f"{s} at the end": outputs | {"swaps": s} for s in end}
        for method, changes in (plain | at_the_end | at_the_swap).items():
            trial = Trial(problem, **common, **changes, batch=32, steps=2500)
            yield Case(f"{problem} of {n}", method, replace(trial, train_lengths=(n,), test_lengths=(n, 2 * n)))


def _convergence() -> Iterator[Case]:
    methods: dict[str, Fields] = {
        "GRU": {},
        "GRU, shuffled": {"fresh": True},
        "GRU, SIRE as published": {"swaps": "published", "compare": "swap", "weight": 1.0},
        "GRU, SIRE at all swaps": {"swaps": "adjacent:all", "compare": "swap"},
        "GRU, SIRE on outputs": _ON_OUTPUTS,
        "GRU, SIRE on outputs, shuffled": _ON_OUTPUTS | {"fresh": True},
    }
    common: Fields = {"hidden": 64, "examples": 100_000, "lr": 5e-3, "steps": 10_000, "until": 0.9}
    for setting, lengths in (("range of 2 to 100", tuple(range(2, 101))), ("range of 100", (100,))):
        for method, changes in methods.items():
            trial = Trial("range", train_lengths=lengths, test_lengths=(10, 50, 100), **common, **changes)
            yield Case(setting, method, trial)


_LP_SETTING = "1.5 swaps a pixel"
_LP_EPOCH = 540  # steps: a tenth of MNIST's 60,000 is held out


def _lp_mnist_rows() -> Iterator[Case]:
    some = {"swaps": "local:200", "weight": 0.1}
    rnn, gru = ({"model": cell, "cell": cell, "hidden": 128} for cell in ("rnn", "gru"))
    methods: dict[str, Fields] = {
        "RNN": rnn,
        "RNN, perturbed anew": rnn | {"fresh": True},
        "RNN, SIRE: 1176 more swaps": rnn | {"swaps": "local:1176", "weight": 0.01},
        "RNN, SIRE: 200 more swaps": rnn | some,
        "RNN, SIRE: one more swap": rnn | {"swaps": "neighbours:1", "weight": 1.0},
        "RNN, SIRE on rows (control)": rnn | {"swaps": "adjacent:4", "compare": "swap"},
        "GRU": gru,
        "GRU, SIRE: 200 more swaps": gru | some,
        "CNN": {"model": "cnn"},
    }
    for method, changes in methods.items():
        yield Case(_LP_SETTING, method, Trial("lp-mnist", batch=128, steps=4000, seconds=40.0, **changes))


def _lp_mnist_pixels() -> Iterator[Case]:
    """Cells of about equal numbers of parameters."""
    gru, lstm, rnn, irnn = (
        {"model": cell, "cell": cell, "hidden": hidden}
        for cell, hidden in (("gru", 64), ("lstm", 56), ("rnn", 112), ("irnn", 112))
    )
    scan: Fields = {"swaps": "adjacent:8", "compare": "swap"}
    fresh: Fields = {"fresh": True}
    weights: Fields = {"weight": (0.1, 1.0, 10.0)}
    slow: Fields = {"lr": (1e-3, 1e-4)}  # what learns nothing at the rate of the others
    methods: dict[str, tuple[Fields, Fields]] = {
        "GRU": (gru, {}),
        "GRU, SIRE along the scan": (gru | scan, weights),
        "GRU, perturbed anew": (gru | fresh, {}),
        "GRU, SIRE along the scan, perturbed anew": (gru | scan | fresh, weights),
        "GRU, SIRE at all neighbours": (gru | {"swaps": "grid:4", "compare": "swap"}, weights),
        "GRU, SIRE at vertical neighbours": (gru | {"swaps": "vertical:4", "compare": "swap"}, weights),
        "GRU, SIRE at vertical neighbours, at the end": (gru | {"swaps": "vertical:1"}, weights),
        "LSTM": (lstm, {}),
        "LSTM, SIRE along the scan": (lstm | scan, weights),
        "RNN (tanh)": (rnn, slow),
        "RNN (tanh), SIRE along the scan": (rnn | scan, slow | weights),
        "RNN (relu, from the identity)": (irnn, slow),
        "RNN (relu, from the identity), SIRE along the scan": (irnn | scan, slow | weights),
        "CNN": ({"problem": "lp-mnist", "model": "cnn", "lr": 1e-3}, {}),
    }
    once = ("RNN", "anew", "all neighbours", "at the end")  # what others are ahead of gets one seed
    common: Fields = {"problem": "lp-mnist-pixels", "batch": 100, "lr": 2e-3, "steps": 40 * _LP_EPOCH, "patience": 25}
    for method, (changes, choices) in methods.items():
        trial = Trial(**(common | changes))
        seeds = 1 if any(words in method for words in once) else None
        decides = 1 / 4 if "LSTM" in method else 1 / 8  # in an eighth no LSTM has begun to learn
        yield Case(_LP_SETTING, method, trial, _choices(trial, **choices), seeds, decides)


def _points() -> Iterator[Case]:
    sire: Fields = {"swaps": "adjacent:8", "compare": "swap", "fresh": True, "weight": 1.0}
    published: Fields = {"swaps": "published", "compare": "swap", "fresh": True, "weight": 1.0}
    methods: dict[str, Fields] = {
        "DeepSets (max)": {"model": "deepsets-max"},
        "GRU, shuffled": {"fresh": True},
        "SIRE": sire,
        "SIRE as published": published,
        "Set Transformer (ISAB)": {"model": "isab"},
    }
    for n, hidden, steps in ((100, 128, 1500), (1000, 64, 600)):
        common: Fields = {"hidden": hidden, "steps": steps, "seconds": 80.0, "train_lengths": (n,)}
        for method, changes in methods.items():
            yield Case(f"{n} points", method, Trial("points", **common, **changes))


def _points_long() -> Iterator[Case]:
    fresh: Fields = {"fresh": True}
    windows: Fields = {"window": 100}
    sire = fresh | {"swaps": "adjacent:8", "compare": "swap", "weight": 1.0}
    published = sire | {"swaps": "published"}
    methods: dict[str, Fields] = {
        "DeepSets (max)": {"model": "deepsets-max"},
        "GRU, shuffled": fresh,
        "SIRE": sire,
        "SIRE as published": published,
        "GRU, shuffled, windows of 100": fresh | windows,
        "SIRE as published, windows of 100": published | windows,
        "Set Transformer (ISAB)": {"model": "isab"},
    }
    common: Fields = {"hidden": 64, "steps": 6000, "patience": 50, "train_lengths": (1000,), "augment": True}
    for method, changes in methods.items():
        trial = Trial("points", **common, **changes)
        yield Case("1000 points", method, trial, _choices(trial, dropout=(0.0, 0.5)))


def _rivals() -> Iterator[Case]:
    others = _DEEP_SETS | _SET_TRANSFORMERS | {"GRU, 20 orders (Janossy)": {"model": "janossy"}}
    for problem in ("parity", "sum", "range", "variance", "max"):
        sire: Fields = {"swaps": "uniform:4"} if problem == "parity" else _ON_OUTPUTS
        fresh: Fields = {"fresh": True}
        methods: dict[str, Fields] = {
            "GRU, shuffled": fresh,
            "GRU, SIRE": sire,
            "GRU, SIRE, shuffled": sire | fresh,
        } | others
        common: Fields = {"hidden": 64, "examples": 10_000, "lr": 2e-3, "steps": 3000, "seconds": 8.0}
        for method, changes in methods.items():
            trial = Trial(problem, train_lengths=_TWO_TO_TEN, test_lengths=_TO_100, **common, **changes)
            yield Case(f"{problem} of 2 to 10", method, trial)


def _poker() -> Iterator[Case]:
    fresh: Fields = {"fresh": True}
    sire: Fields = {"swaps": "uniform:4", "weight": 1.0}
    methods: dict[str, Fields] = {
        "GRU": {},
        "GRU, shuffled": fresh,
        "GRU, SIRE": sire,
        "GRU, SIRE, shuffled": sire | fresh,
    }
    methods |= {"DeepSets (sum)": {"model": "deepsets-sum"}}
    for examples in (1000, 25_010):  # as many as UCI's training set has
        common: Fields = {"hidden": 64, "examples": examples, "lr": 3e-3, "steps": 2500, "seconds": 10.0}
        for method, changes in methods.items():
            yield Case(f"{examples} hands", method, Trial("poker", **common, **changes))


def _lengths() -> Iterator[Case]:
    methods: dict[str, Fields] = {"GRU": {}, "GRU, shuffled": {"fresh": True}, "GRU, SIRE on outputs": _ON_OUTPUTS}
    for longest in (5, 10, 20, 50, 100):
        common: Fields = {"hidden": 64, "examples": 10_000, "lr": 2e-3, "steps": 2500}
        for method, changes in methods.items():
            lengths: Fields = {"train_lengths": tuple(range(2, longest + 1)), "test_lengths": (5, 10, 20, 50, 100, 200)}
            yield Case(f"trained on 2 to {longest}", method, Trial("range", **common, **lengths, **changes))


EXPERIMENTS = {
    "figure1": Experiment("parity of longer sequences than trained on", _figure1, at=("100",)),
    "figure2": Experiment("sums, ranges and other statistics of numbers", _figure2, at=("50",)),
    "figure2-long": Experiment(
        "sums, ranges and variances, 300 epochs of 100,000 sequences", _figure2_long, "epochs", seeds=3
    ),
    "warm-up": Experiment(
        "parity with three units: weight of the penalty early in training",
        _warm_up,
        "epochs",
        at=("100",),
        seeds=20,
    ),
    "table1": Experiment(
        "classes of point clouds",
        _points,
        published={
            ("100 points", "DeepSets (max)"): 0.825,
            ("100 points", "SIRE"): 0.835,
            ("1000 points", "DeepSets (max)"): 0.872,
            ("1000 points", "SIRE"): 0.878,
        },
        published_on="ModelNet40",
    ),
    "table1-long": Experiment(
        "classes of point clouds, augmented, ten times the steps",
        _points_long,
        published={("1000 points", "DeepSets (max)"): 0.872}
        | {
            ("1000 points", method): 0.878
            for method in ("SIRE", "SIRE as published", "SIRE as published, windows of 100")
        },
        published_on="ModelNet40",
        seeds=3,
    ),
    "half-range": Experiment(
        "largest of one half minus smallest of the other: order matters in part", _half_range, "dots", at=("10", "50")
    ),
    "lp-mnist-rows": Experiment(
        "digits whose neighbouring pixels have changed places, read by rows",
        _lp_mnist_rows,
        published={
            (_LP_SETTING, "RNN"): 0.87,
            (_LP_SETTING, "CNN"): 0.96,
            (_LP_SETTING, "RNN, SIRE: 1176 more swaps"): 0.977,
        },
        published_on="MNIST",
    ),
    "lp-mnist-pixels": Experiment(
        "digits whose neighbouring pixels have changed places, read by pixels",
        _lp_mnist_pixels,
        published={
            (case.setting, case.method): 0.977 if "SIRE" in case.method else 0.96 if case.method == "CNN" else 0.87
            for case in _lp_mnist_pixels()
        },
        published_on="MNIST",
        seeds=3,
    ),
    "swaps": Experiment("how many swaps are needed, fixed or adaptive", _swaps),
    "convergence": Experiment(
        "epochs and seconds until a range is learned",
        _convergence,
        "seconds",
        targets=(0.25, 0.5, 0.75, 0.9),
    ),
    "lengths": Experiment("length of training against length of the test", _lengths, "heat map", at=("100",)),
    "poker": Experiment("worth of five cards, whose order does not matter", _poker),
    "rivals": Experiment("all tasks against models that ignore order by construction", _rivals, at=("50",)),
}


_COST_SWAPS = ("adjacent:1", "adjacent:8", "adjacent:all")
_COST_ROUNDS = {"quick": 2, "full": 12}


def cost_rounds(preset: str) -> int:
    """How often `cost` calls `finished`."""
    return len(_COST_SWAPS) * (benchmark.WARM_UP + _COST_ROUNDS[preset])


def cost(preset: str, finished: Callable[[], None]) -> dict[str, Any]:
    """What the penalty costs in a training step: every way to compute it, timed side by side."""
    small: Fields = {"T": 10, "B": 4, "I": 8, "H": 8}
    size = small if preset == "quick" else {"T": 100, "B": 64, "I": 256, "H": 256}
    rows = []
    for swaps in _COST_SWAPS:
        setting = Setting("GRU", **size, swaps=swaps, compare="swap")
        contest = {name: benchmark.Step(setting, name) for name in benchmark.contestants(setting)}
        seconds = benchmark.measure(contest, _COST_ROUNDS[preset], finished)
        rows.append(benchmark.summary(setting, seconds, dict.fromkeys(contest)))
    return {"experiment": "cost", "settings": rows}
