"""Which forwards of a layer count for its penalty, and the weight with which the penalty joins by itself.

A forward counts until it has been differentiated, or no longer can be: its weights have changed, or all that it
returned is gone (the last few forwards count even then: the penalty alone may be wanted). Each thread has its own.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from sire_fast import ops
from sire_fast.cells import States
from sire_fast.passes import Compared

_keys = itertools.count()

# a number, a 0-d tensor, or a function that gives one of them whenever a backward asks
Weight = float | Tensor | Callable[[], float | Tensor]

_HELD = 4  # the last forwards, which count though nobody holds what they returned

_NEVER = "run a forward in training mode first"
WITHOUT_GRADIENT = "the last forward ran under torch.no_grad(), in which no swaps are drawn"
_OVER = "every forward has been differentiated already: read the penalty between forward and backward"
_REENTRANT = (
    "the layer ran in a checkpoint with use_reentrant=True, which hides its gradient: use use_reentrant=False, or "
    "convert(..., weight=...), with which the penalty joins by itself"
)
_COMPILED = "call it outside of the compiled function, where the weight joins by itself"
_DROPPED = (
    "a forward in training mode was dropped, and its penalty with it, before a backward; run forwards that do not "
    "train under torch.no_grad() or in eval()"
)


class Forward:
    """A forward whose penalty the caller adds to the loss.

    Attributes:
        differentiated: whether a backward has come through what it returned, or through its penalty.
        compared: held here for a while.
        node: weak, of the graph; it holds what is compared, as long as anybody holds what the forward returned.
    """

    def __init__(self, weights: list[Tensor], compared: Compared) -> None:
        self.differentiated = False
        self.weights, self.versions = weights, [w._version for w in weights]
        self.compared: Compared | None = compared
        self.node: Callable[[], Any] = lambda: None

    def mark(self, gradient: Tensor) -> None:
        """A hook for what was made of it."""
        self.differentiated = True

    @property
    def over(self) -> bool:
        return self.differentiated or self.versions != [w._version for w in self.weights]

    def found(self) -> Compared | None:
        """What is compared, None if it is gone."""
        return self.compared or getattr(self.node(), "compared", None)


class Round:
    """The forwards up to a backward, of a layer whose penalty joins by itself.

    Attributes:
        differentiated: whether a backward has come through one of them.
        count: variants of all of them.
        total: of their penalties, detached.
        key: its number.
    """

    def __init__(self) -> None:
        self.differentiated = False
        self.count, self.total = 0, None
        self.key = next(_keys)

    def add(self, penalty: Tensor) -> None:
        self.count += penalty.numel()
        more = penalty.detach().sum()
        self.total = more if self.total is None else more + self.total.to(more.device)


class _State:
    """What a thread has of a ledger, it and those that run replicas for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.forwards: list[Forward] = []
        self.round = Round()
        # of passes that a backward runs again, or that live inside a transform of torch.func: read at once or never
        self.passing: deque[Compared] = deque(maxlen=64)
        # of passes that a backward will run again, in a checkpoint without gradients: read in there
        self.hidden: deque[Compared] = deque(maxlen=64)
        self.told = _NEVER

    def clear(self) -> None:
        self.passing.clear()
        self.hidden.clear()


class _Local(threading.local):
    def __init__(self) -> None:
        self.state = _State()


class Ledger:
    """Of one layer. Copies and pickles begin anew.

    Args:
        weight: None where the caller adds the penalty to the loss.

    Attributes:
        watcher: of a weight of 0, which looks at the penalty and changes nothing: the source of its swaps.

    Raises:
        ValueError: it is no weight.
    """

    def __init__(self, weight: Weight | None = None) -> None:
        if isinstance(weight, Tensor):
            fits = weight.dim() == 0 and weight.dtype.is_floating_point
        else:
            fits = weight is None or callable(weight) or (isinstance(weight, Real) and 0 <= weight < math.inf)
        if not fits:
            raise ValueError(
                f"weight: expected a number of at least 0, a 0-d tensor, a function or None, got {weight!r}"
            )
        self.weight = weight
        self.joins = weight is not None
        # of the last run of a compiled function: what its forwards compare, or else their notes
        self.traced: tuple[Any, ...] = ()
        watches = isinstance(weight, Real) and weight == 0
        self.watcher = torch.Generator().manual_seed(torch.initial_seed()) if watches else None
        self.key = next(_keys)
        self._local, self._shared = _Local(), None
        _ledgers[self.key] = self
        _prepare_compiler()

    def __deepcopy__(self, memo: dict) -> Ledger:
        return Ledger(self.weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger, (self.weight,)

    def of_this_thread(self) -> Ledger:
        """For a replica of the layer, which another thread runs: it writes where this thread reads."""
        replica = Ledger.__new__(Ledger)
        replica.__dict__.update(self.__dict__, _shared=self._state)
        return replica

    @property
    def _state(self) -> _State:
        return self._shared or self._local.state

    # ---------------------------------------------------------------- the layer's side

    def skip(self, told: str) -> None:
        """Note why a forward in training mode ran no variants."""
        self._state.told = told

    def enter(self, weights: list[Tensor], compared: Compared, output: Tensor, last: States) -> tuple[Tensor, States]:
        """Note a pass. Returns what the layer is to return: a backward through it ends the pass, and there the weight
        joins."""
        if torch.compiler.is_compiling():
            return self._trace(compared, output, last)
        state, rerun = self._state, in_backward()
        transformed = torch._C._are_functorch_transforms_active()
        state.told = _OVER
        if self.joins:
            if not torch.is_grad_enabled():
                self._note(compared.penalty)
                return output, last
            if transformed:
                output, *last = _GiveTransformed.apply(self, compared.penalty, output, *last)
                return output, tuple(last)
            noted = self._note(compared.penalty)
            noted.count = noted.count or compared.penalty.numel()
            output, *last = _Give.apply(self, noted, compared.penalty, output, *last)
            return output, tuple(last)
        if rerun or transformed:
            state.passing.append(compared)
            if rerun:
                torch.autograd.Variable._execution_engine.queue_callback(state.clear)
            return output, last
        if not torch.is_grad_enabled():
            state.hidden.append(compared)
            return output, last
        forward = Forward(weights, compared)
        if compared.output is output:
            output = ops.own_memory(output)
        output, *last = _Give.apply(None, forward, None, output, *last)
        if output.grad_fn is not None:
            output.grad_fn.compared = compared
            forward.node = weakref.ref(output.grad_fn)
        with state.lock:
            state.passing.clear()
            state.forwards = [f for f in state.forwards if not f.over]
            state.forwards.append(forward)
            _let_go(state.forwards)
        return output, tuple(last)

    def watch(self, penalty: Tensor) -> None:
        """Note a penalty that joins nowhere."""
        self._state.round = Round()
        self._state.round.add(penalty)

    def _note(self, penalty: Tensor) -> Round:
        """The round of a forward, which is counted unless a backward runs it again."""
        state = self._state
        with state.lock:
            if not in_backward():
                if state.round.differentiated:
                    state.round = Round()
                state.round.add(penalty)
            return state.round

    def _trace(self, compared: Compared, output: Tensor, last: States) -> tuple[Tensor, States]:
        kept: Any = compared
        if self.joins:  # as a result of the graph the note cannot be put off until the backward
            kept, output, *last = _GiveTraced.apply(self.key, compared.penalty, output, *last)
        self.traced = (kept,) if _first_in_trace(self) else (*self.traced, kept)
        return output, tuple(last)

    # ---------------------------------------------------------------- the penalty's side

    def counting(self) -> list[tuple[Compared, Callable[[Tensor], None] | None]]:
        """What the forwards that count compare, of a layer whose weight does not join by itself, and the hook that is
        to learn of a backward through it.

        Raises:
            RuntimeError: some ran where their penalty cannot be differentiated.
        """
        if torch.compiler.is_compiling():
            return [(c, None) for c in self.traced]
        state = self._state
        for passing, now in (
            (state.passing, in_backward() or torch._C._are_functorch_transforms_active()),
            (state.hidden, not torch.is_grad_enabled()),
        ):
            if passing and now:
                found = [(c, None) for c in passing]
                passing.clear()
                return found
        if state.hidden:
            state.clear()
            raise RuntimeError(f"penalty: {_REENTRANT}")
        self.traced = tuple(c for c in self.traced if not _freed(c.penalty))
        found = [(f.found(), f.mark) for f in state.forwards if not f.over]
        return [(c, mark) for c, mark in found if c is not None] + [(c, None) for c in self.traced]

    def joined(self) -> Tensor | None:
        """The penalty of the last round, detached, of a layer whose weight joins by itself; None if there is none."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"penalty: {_COMPILED}")
        of = self._state.round
        return None if of.total is None else of.total / max(of.count, 1)

    @property
    def told(self) -> str:
        """Why nothing counts."""
        return self._state.told

    def share(self, of: Round, like: Tensor) -> Tensor:
        """The gradient of each variant's penalty, of so many in a round, 0-d."""
        of.differentiated = True
        weight = self.weight() if callable(self.weight) else self.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.as_tensor(weight, dtype=wide).detach().to(like.device) / max(of.count, 1)


_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()
_rounds: weakref.WeakValueDictionary[int, Round] = weakref.WeakValueDictionary()


def _let_go(forwards: list[Forward]) -> None:
    """Hold what the last forwards compare, and forget those of the others that nobody holds."""
    for forward in forwards[:-_HELD]:
        forward.compared = None
    gone = [f for f in forwards if f.found() is None]
    if gone:
        forwards[:] = [f for f in forwards if f not in gone]
        warn(_DROPPED)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def runs_again() -> bool:
    """Whether a forward without gradients is that of a custom function of autograd, which a backward runs again with
    them, as a checkpoint with use_reentrant=True does."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(
            frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx
        ):
            return True
        frame = frame.f_back
    return False


def warn(message: str) -> None:
    """Warn at the line of the program that has called a layer."""
    frame, level = sys._getframe(1), 3
    while frame.f_back and frame.f_back.f_globals.get("__name__", "").partition(".")[0] in ("sire_fast", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"sire_fast: {message}", stacklevel=level)


def _freed(tensor: Tensor) -> bool:
    """Whether a backward has freed the graph of a tensor that a compiled function returned."""
    nodes = [tensor.grad_fn]
    for node in nodes:
        if node is None:
            continue
        if hasattr(type(node), "_raw_saved_tensors"):
            try:
                return node._raw_saved_tensors is None
            except RuntimeError:
                return True
        nodes += [n for n, _ in node.next_functions][: 64 - len(nodes)]
    return False


# ---------------------------------------------------------------- what a layer returns


class _Give(torch.autograd.Function):
    """The results of a layer: the same memory under other tensors, which may be changed in place and detached."""

    @staticmethod
    def forward(
        ctx: Any, ledger: Ledger | None, noted: Forward | Round, penalty: Tensor | None, *results: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ledger, ctx.noted = ledger, noted
        ctx.shape = None if penalty is None else penalty.shape
        ctx.set_materialize_grads(False)
        return tuple(t.data for t in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.noted.differentiated = True
        joined = None
        if ctx.ledger is not None:  # once, however many backwards come through
            like = next(g for g in grads if g is not None)
            joined = ctx.ledger.share(ctx.noted, like).expand(ctx.shape)
            ctx.ledger = None
        return None, None, joined, *grads


class _GiveTransformed(torch.autograd.Function):
    """So for transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ledger: Ledger, penalty: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.ledger, ctx.shape, ctx.noted = inputs[0], inputs[1].shape, Round()
        ctx.noted.count = inputs[1].numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ledger.share(ctx.noted, grads[0]).expand(ctx.shape), *grads


# In a compiled function, which neither keeps nor reads Python's objects when it runs, operators do it.

ops.LIBRARY.define("note(Tensor penalty, int ledger) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
ops.LIBRARY.define("share(Tensor gradient, Tensor round, int ledger) -> Tensor", tags=torch.Tag.cudagraph_unsafe)


class _GiveTraced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ledger: int, penalty: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        noted = torch.ops.sire_fast.note(penalty, ledger)
        ctx.ledger, ctx.shape = ledger, penalty.shape
        ctx.save_for_backward(noted)
        ctx.mark_non_differentiable(noted)
        return noted, *(t.clone() for t in results)

    @staticmethod
    def backward(ctx: Any, _: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share = torch.ops.sire_fast.share(grads[0], *ctx.saved_tensors, ctx.ledger)
        return None, share.expand(ctx.shape), *grads


@torch.library.impl("sire_fast::note", "CompositeExplicitAutograd")
def _note(penalty: Tensor, ledger: int) -> Tensor:
    noted = _ledgers[ledger]._note(penalty)
    _rounds[noted.key] = noted
    return torch.tensor(noted.key)


@torch.library.register_fake("sire_fast::note")
def _noted(penalty: Tensor, ledger: int) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.impl("sire_fast::share", "CompositeExplicitAutograd")
def _share(gradient: Tensor, round: Tensor, ledger: int) -> Tensor:
    return _ledgers[ledger].share(_rounds[int(round)], gradient)


@torch.library.register_fake("sire_fast::share")
def _shared(gradient: Tensor, round: Tensor, ledger: int) -> Tensor:
    return gradient.new_empty((), dtype=torch.promote_types(gradient.dtype, torch.float32))


_traces: weakref.WeakKeyDictionary[TracingContext, set[int]] = weakref.WeakKeyDictionary()


def _first_in_trace(ledger: Ledger) -> bool:
    """Whether this is the first pass of a layer in the function that is being compiled; asked once, while it is."""
    seen = _traces.setdefault(TracingContext.get(), set())
    first = ledger.key not in seen
    seen.add(ledger.key)
    return first


@functools.cache
def _prepare_compiler() -> None:
    """Let torch.compile trace subclasses of torch.nn's recurrent layers, which it otherwise never does. The switch is
    one for all: torch's own layers are traced then, too."""
    import torch._dynamo  # takes a second, which an optimiser needs as well

    torch._dynamo.config.allow_rnn = True
    torch.compiler.assume_constant_result(_first_in_trace)
