"""Which forwards of a layer count for its penalty, and the weight with which the penalty joins by itself.

A forward counts until it has been differentiated, or no longer can be: its weights have changed, or all that it
returned is gone (where that holds for all of them, the last few count: the penalty alone may be wanted). That of a
frozen layer, which nothing can differentiate, counts until its penalty has been read and the next begins. Each thread
has its own.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.utils.checkpoint import CheckpointFunction

from sire_fast import graph, ops
from sire_fast.cells import States
from sire_fast.passes import Compared
from sire_fast.validation import readable, warn

_keys = itertools.count()

# a number, a 0-d tensor, or a function that gives one of them whenever a backward asks
Weight = float | Tensor | Callable[[], float | Tensor]

_NONE = -1
_HELD = 4  # the last forwards, which count where nobody holds what any of them returned
_FEW = 64  # forwards that are looked through at every other one; more are when they have doubled

_NEVER = "run a forward in training mode first"
WITHOUT_GRADIENT = "the last forward ran under torch.no_grad(), in which no swaps are drawn"
_OVER = "every forward has been differentiated already: read the penalty between forward and backward"
_REENTRANT = (
    "the layer ran in a checkpoint with use_reentrant=True, which hides its gradient: use use_reentrant=False, or "
    "convert(..., weight=...), with which the penalty joins by itself"
)
_COMPILED = "call it outside of the compiled function, where the weight joins by itself"
_TWICE = (
    "the penalty has joined a gradient with create_graph=True, and would join what is made of it once more: use "
    "convert(model), and add sire_fast.penalty(model) to the loss"
)
_LEARNED = (
    "expected a tensor that wants no gradient, since a weight that joins by itself gets none: detach it, or add "
    "weight * sire_fast.penalty(model) to the loss"
)
_COMPILED_AGAIN = (
    "a compiled layer draws no swaps in the first run of a checkpoint with use_reentrant=True: use use_reentrant=False"
)
_UNTRAINED = (
    "backwards come through this layer, but not through its penalty: add sire_fast.penalty(model), not detached, to "
    "the loss, or convert(..., weight=...), with which it joins by itself (a weight of 0 only watches)"
)
_EVALUATED = (
    "this layer is trained in eval(), in which no swaps are drawn and its penalty is 0: call model.train(), or convert "
    "it with swaps=None"
)
_DROPPED = (
    "a forward in training mode was dropped, and its penalty with it, before a backward; run forwards that do not "
    "train under torch.no_grad() or in eval()"
)
_READ_AGAIN = (
    "this penalty counts forwards whose penalty was read before, too, since no backward has come through them: read it "
    "once, after all forwards of a step (for a log under torch.no_grad()), and `del` what is held of a skipped batch"
)
_NOT_TRAINED = (
    "a forward in training mode had its share of the weight, and no backward came through it before those of the next "
    "step; run forwards that do not train under torch.no_grad() or in eval()"
)
_GONE = (
    "the penalty has joined the gradients of an earlier backward through this forward, which were zeroed, and "
    "does not join again: use them, or convert(model) and add weight * sire_fast.penalty(model) to the loss"
)
_OTHERS = (
    "penalty(model) in a compiled function counts the forwards of its own graph alone, and others wait for a backward: "
    "read it outside, and run forwards that do not train under torch.no_grad() or in eval()"
)


class Mark:
    """Whether a backward has come through a forward, whether through its penalty, and whether in part, for what lies
    before the layer alone. It is all that a hook of the penalty holds of it, since what was computed holds the hook."""

    def __init__(self) -> None:
        self.differentiated = self.trained = self.in_part = False

    def __call__(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # it is None where a backward comes through the layer, and not through this
            self.differentiated = self.trained = True


class Forward:
    """A forward whose penalty the caller adds to the loss.

    Attributes:
        compared: held here for a while.
        frozen: whether no backward can come through it.
        read: whether its penalty has been.
        in_loss: whether with gradients, so that it may be in a loss.
        node: weak, of the graph; it holds what is compared, as long as anybody holds what the forward returned.
    """

    def __init__(self, weights: list[Tensor], compared: Compared) -> None:
        self.mark = Mark()
        self.weights, self.versions = weights, graph.versions(weights)
        self.compared: Compared | None = compared
        self.frozen, self.read, self.in_loss = not compared.penalty.requires_grad, False, False
        self.node: Callable[[], Any] = lambda: None

    @property
    def over(self) -> bool:
        if self.mark.differentiated or self.versions != graph.versions(self.weights):
            return True
        return self.mark.in_part and not graph.kept(self.node())

    @property
    def held(self) -> bool:
        """Whether anybody holds what it returned."""
        return self.node() is not None

    def ends_before(self, other: Forward) -> bool:
        """Whether it counts no more when another comes."""
        return self.over or (self.frozen and (self.read or not other.frozen))

    def found(self) -> Compared | None:
        """What is compared, None if it is gone."""
        return self.compared or getattr(self.node(), "compared", None)


class Note(Mark):
    """A forward whose penalty joins by itself.

    Attributes:
        count: of its variants.
        total: of their penalties, detached.
        node: weak, of the graph or held by it, which is gone when nobody holds what the forward returned; gives None
            for a frozen layer. None until it is known.
        joined: the numbers of the nodes whose gradients it has joined.
        twice: whether it has in a gradient that may be differentiated in turn.
        spent: whether it is of a later backward through a forward that each runs again; the first has had its share.
        counted: whether others have had their shares beside it.
    """

    def __init__(self, penalty: Tensor, round: Round) -> None:
        super().__init__()
        self.count, self.total, self.round = penalty.numel(), penalty.detach().sum(), round
        self.node: Callable[[], Any] | None = None
        self.joined: set[int] = set()
        self.twice = self.spent = self.counted = False
        self.key = next(_keys)

    @property
    def counts(self) -> bool:
        if self.differentiated or self.node is None:
            return True
        node = self.node()
        return node is not None and (not self.in_part or graph.kept(node))

    def ends_with(self, output: Tensor) -> None:
        """Learn of a backward through what the forward returned, which leaves no trace in it."""

        def differentiated(*_: Any) -> None:  # held by the graph alone
            self.differentiated = self.round.differentiated = True

        if output.grad_fn is None or graph.in_transform():
            differentiated()
        else:
            output.grad_fn.register_hook(differentiated)
            self.node = weakref.ref(differentiated)


class Round:
    """The forwards up to a backward, of a layer whose penalty joins by itself."""

    def __init__(self) -> None:
        self.differentiated = False
        self.notes: list[Note] = []
        self._swept = _FEW  # notes among which to look next for those that count no more
        self._counted = graph.NO_BACKWARD, 0  # in which backward, and what

    def add(self, penalty: Tensor) -> Note:
        if len(self.notes) >= self._swept:
            self.notes = [n for n in self.notes if n.counts]
            self._swept = 2 * len(self.notes) + _FEW
        self.notes.append(Note(penalty, self))
        return self.notes[-1]

    @property
    def count(self) -> int:
        """Variants of all forwards that count, in this backward."""
        backward = graph.this_backward()
        if backward == graph.NO_BACKWARD or self._counted[0] != backward:
            counting = [n for n in self.notes if n.counts]
            for note in counting:
                note.counted = True
            self._counted = backward, sum(n.count for n in counting)
        return self._counted[1]

    @property
    def lost(self) -> bool:
        """Whether a forward had its share of the weight, and no backward came through it."""
        return self.differentiated and any(n.counted and not n.differentiated for n in self.notes)

    def mean(self) -> Tensor | None:
        """Of the penalties, detached; None if there was no forward."""
        notes = [n for n in self.notes if n.counts and n.count] or self.notes[-1:]
        if not notes:
            return None
        total = sum((n.total.to(notes[0].total.device) for n in notes[1:]), notes[0].total)
        return total / max(sum(n.count for n in notes), 1)


class Rerun:
    """A forward without gradients that a backward runs again with them, perhaps in other parts: its round, and the
    layer's variants in it, then and since."""

    def __init__(self, round: Round) -> None:
        self.round, self.variants, self.since = round, 0, 0


class _State:
    """What a thread has of a ledger, it and those that run replicas for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.forwards: list[Forward] = []
        self.swept = 0  # forwards among which to look next for those that count no more
        self.round = Round()
        # of passes that a backward runs again, or that live inside a transform of torch.func: read at once or never
        self.passing: deque[Compared] = deque(maxlen=64)
        # of passes that a backward will run again, in a checkpoint without gradients: read in there
        self.hidden: deque[Compared] = deque(maxlen=64)
        self.earlier: list[Compared] = []  # of runs of compiled functions before the last
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
            fits = weight.dim() == 0 and weight.dtype.is_floating_point and 0 <= weight.item() < math.inf
        else:
            fits = weight is None or callable(weight) or (isinstance(weight, Real) and 0 <= weight < math.inf)
        if not fits:
            raise ValueError(
                f"weight: expected a number of at least 0, a 0-d tensor, a function or None, got {weight!r}"
            )
        _check_not_learned(weight)
        self.weight = weight
        self.joins = weight is not None
        self._untrained: int | None = 0  # backwards that came through no penalty; None after one that did
        # version of a parameter in the last backward in eval(), _NONE before there was one; None after telling
        self._evaluated: int | None = _NONE
        # of the last run of a compiled function: what its forwards compare, or else their notes
        self.traced: tuple[Any, ...] = ()
        self._ran_by: _State | None = None  # the state of the thread that has run it
        self._again = False  # whether a backward has, once more
        watches = isinstance(weight, Real) and weight == 0
        self.watcher = torch.Generator().manual_seed(torch.initial_seed()) if watches else None
        self.key = next(_keys)
        self._local, self._shared = _Local(), None
        # of the nodes that a backward runs again, perhaps in a thread of its own
        self._reruns: weakref.WeakKeyDictionary[Any, Rerun] = weakref.WeakKeyDictionary()
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

    def enter(
        self, weights: list[Tensor], inputs: list[Tensor], compared: Compared, output: Tensor, last: States
    ) -> tuple[Tensor, States]:
        """Note a pass with these weights over these inputs and states. Returns what the layer is to return: a backward
        through it ends the pass, and there the weight joins."""
        if torch.compiler.is_compiling():
            return self._trace(compared, output, last)
        state, rerun = self._state, graph.in_backward()
        transformed = graph.in_transform()
        state.told = _OVER
        if self._evaluated is not None:
            self._evaluated = _NONE
        if self.joins:
            if transformed:
                output, *last = _GiveTransformed.apply(self, _Level(), compared.penalty, output, *last)
                return output, tuple(last)
            if not rerun and state.round.lost:
                warn(_NOT_TRAINED)
            note = self.note(compared.penalty)
            if not torch.is_grad_enabled():
                again = graph.runs_again()
                note.node = weakref.ref(again)
                self._reruns.setdefault(again, Rerun(note.round)).variants += note.count
                return output, last
            trained = [w for w in weights if w.requires_grad] or [compared.penalty]
            sources = [node for t in trained if t.requires_grad for node in graph.behind(graph.node_of(t))]
            output, *last = _Give.apply(self, note, sources, compared.penalty, output, *last)
            note.node = (lambda: None) if output.grad_fn is None else weakref.ref(output.grad_fn)
            return output, tuple(last)
        if rerun or transformed:
            while state.passing and graph.left(state.passing[0].penalty):
                state.passing.popleft()
            state.passing.append(compared)
            if rerun:
                graph.when_backward_ends(state.clear)
            return output, last
        if not torch.is_grad_enabled():
            state.hidden.append(compared)
            return output, last
        forward = Forward(weights, compared)
        if compared.output is output:
            output = ops.own_memory(output)
        sources = []  # of a backward that may be for the inputs alone; one weight tells enough
        if any(x.requires_grad for x in inputs):
            sources = [graph.node_of(w) for w in [w for w in weights if w.requires_grad][:1]]
        output, *last = _Give.apply(self, forward.mark, sources, None, output, *last)
        node: Any = output.grad_fn
        if node is not None:
            node.compared = compared
            forward.node = weakref.ref(node)
        with state.lock:
            state.passing.clear()
            look = len(state.forwards) >= state.swept or forward.frozen or state.forwards[-1].over
            if look:
                self._passed([f.mark for f in state.forwards])
                state.forwards = [f for f in state.forwards if not f.ends_before(forward)]
                state.swept = 2 * len(state.forwards) if len(state.forwards) > _FEW else 0
            state.forwards.append(forward)
            _let_go(state.forwards, all_of_them=look)
        return output, tuple(last)

    def note(self, penalty: Tensor) -> Note:
        """A forward, which counts in its round unless a backward runs it again."""
        state = self._state
        with state.lock:
            if graph.in_backward():
                again = graph.running("backward")
                rerun = self._reruns.get(again) if again is not None else None
                note = Note(penalty, rerun.round if rerun else state.round)
                if rerun and torch.is_grad_enabled():
                    rerun.since += note.count
                    note.spent = rerun.since > rerun.variants
                for first in note.round.notes:
                    if again is not None and first.node is not None and first.node() is again:
                        first.differentiated = True
                return note
            if state.round.differentiated:
                state.round = Round()
            return state.round.add(penalty)

    def _trace(self, compared: Compared, output: Tensor, last: States) -> tuple[Tensor, States]:
        kept: Any
        if self.joins and not output.requires_grad:  # of a frozen layer: no backward comes
            kept = torch.ops.sire_fast.note(compared.penalty, self.key, True)
        elif self.joins:  # as a result of the graph the note cannot be put off until the backward
            kept, output, *last = _GiveTraced.apply(self.key, compared.penalty, output, *last)
        else:
            others: Any = compared[1:]
            kept = Compared(torch.ops.sire_fast.turn(compared.penalty, self.key), *others)
        self.traced = (kept,) if _first_in_trace(self.key) else (*self.traced, kept)
        return output, tuple(last)

    def turn(self) -> None:
        """Put away what the last run of a compiled function compares, before another takes its place."""
        earlier = (self._ran_by or self._state).earlier
        earlier += () if self._again else self.traced
        self.traced, self._again = (), graph.in_backward()
        if self._again:
            return
        self._ran_by = self._state
        trained = [c for c in earlier if c.penalty.requires_grad]  # not by a frozen layer
        self._passed([_mark(c) for c in trained if graph.freed(c.penalty)], over=True)
        earlier[:] = [c for c in trained if not graph.freed(c.penalty)]
        if len(earlier) > _HELD:
            del earlier[:-_HELD]
            warn(_DROPPED)

    def _passed(self, marks: list[Mark], over: bool = False) -> None:
        """Tell once of backwards through forwards, or those that are over, if they came through no penalty."""
        for mark in marks:
            if mark.trained:
                self._untrained = None
            elif self._untrained is not None and (over or mark.differentiated):
                self._untrained += 1
                if self._untrained == 2:  # one may be a try
                    warn(_UNTRAINED)

    def look_for_training(self, parameters: Iterator[Tensor], results: list[Tensor]) -> None:
        """Tell once where a forward in evaluation mode, of these results, is one step of a training."""
        if self._evaluated is None or self.watcher is not None or graph.in_transform():
            return
        parameter = next((p for p in parameters if p.requires_grad), None)
        if parameter is None:
            return
        node, version = graph.node_of(parameter), parameter._version

        def passed(*_: Any) -> None:
            if self._evaluated is None or not graph.reached([node]):
                return
            if self._evaluated in (_NONE, version):
                self._evaluated = version
            else:  # the second backward behind each other, and a step of an optimiser between them
                self._evaluated = None
                warn(_EVALUATED)

        for result in results:
            if result.grad_fn is not None:
                result.grad_fn.register_hook(passed)

    # ---------------------------------------------------------------- the penalty's side

    def counting(self) -> list[tuple[Compared, Mark | None]]:
        """What the forwards that count compare, of a layer whose weight does not join by itself, and the hook that is
        to learn of a backward through it.

        Raises:
            RuntimeError: some ran where their penalty cannot be differentiated.
        """
        if torch.compiler.is_compiling():
            self._untrained = None  # as far as anybody can see
            alone = torch.ops.sire_fast.alone
            return [(c._replace(penalty=alone(c.penalty, self.key)), None) for c in self.traced]
        state = self._state
        for passing, now in (
            (state.passing, graph.in_backward() or graph.in_transform()),
            (state.hidden, not torch.is_grad_enabled()),
        ):
            if passing and now:
                found: list[tuple[Compared, Mark | None]] = [(c, None) for c in passing if not graph.left(c.penalty)]
                passing.clear()
                return found
        if state.hidden:
            state.clear()
            raise RuntimeError(f"penalty: {_REENTRANT}")
        if self._again and graph.in_backward():
            return [(c, None) for c in self.traced]
        last = self.traced if self._ran_by is state and not self._again else ()
        traced = [c for c in (*state.earlier, *last) if not graph.freed(c.penalty)]
        each: list[tuple[Compared, Mark | None]] = [(c, _mark(c)) for c in traced]
        forwards = [f for f in state.forwards if not f.over]
        held = [f for f in forwards if f.held]
        if held and len(held) < len(forwards):
            forwards = held  # the rest has no part in the loss
            warn(_DROPPED)
        if any(f.in_loss for f in forwards) and not all(f.in_loss for f in forwards):
            warn(_READ_AGAIN)
        for forward in forwards:
            compared = forward.found()
            if compared:
                forward.read, forward.in_loss = True, forward.in_loss or torch.is_grad_enabled()
                each.append((compared, forward.mark))
        return each

    def tell_if_not_alone(self) -> None:
        """Tell of forwards that a compiled function, which reads the penalty, cannot count."""
        state = self._state
        if any(f.held and not f.over for f in state.forwards) or not all(graph.freed(c.penalty) for c in state.earlier):
            warn(_OTHERS)

    def joined(self) -> Tensor | None:
        """The penalty of the last round, detached, of a layer whose weight joins by itself; None if there is none."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"penalty: {_COMPILED}")
        return self._state.round.mean()

    @property
    def told(self) -> str:
        """Why nothing counts."""
        return self._state.told

    def share(self, note: Note, like: Tensor) -> Tensor:
        """The gradient of each variant's penalty of a forward, 0-d."""
        note.differentiated = note.round.differentiated = True
        with torch.enable_grad():  # for what is made of a tensor that is learned to say so
            weight = self.weight() if callable(self.weight) else self.weight
        _check_not_learned(weight)
        wide = torch.promote_types(like.dtype, torch.float32)
        try:
            weight = torch.as_tensor(weight, dtype=wide).reshape(())
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"weight: expected a number or a 0-d tensor from {self.weight}, got {weight!r}") from error
        if readable(weight) and not 0 <= weight < math.inf:
            raise ValueError(f"weight: expected a number of at least 0 from {self.weight}, got {weight.item()}")
        return weight.to(like.device) / max(note.round.count or note.count, 1)


def _check_not_learned(weight: object) -> None:
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(f"weight: {_LEARNED}")


_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()
_NOTES = 4096
_notes: OrderedDict[int, tuple[Note, Ledger]] = OrderedDict()  # the last ones of compiled functions


def _let_go(forwards: list[Forward], all_of_them: bool) -> None:
    """Hold what the last forwards compare, and forget those of the others, or of the one that is now, that nobody
    holds."""
    others = forwards[:-_HELD] if all_of_them else forwards[-_HELD - 1 : -_HELD]
    for forward in others:
        forward.compared = None
    gone = [f for f in others if f.found() is None]
    if gone:
        lost = {*map(id, gone)}
        forwards[:] = [f for f in forwards if id(f) not in lost]
        if not all(f.frozen for f in gone):
            warn(_DROPPED)


def _mark(compared: Compared) -> Mark:
    """That of a forward in a compiled function, which the tensor that it returned holds."""
    return vars(compared.penalty).setdefault("sire_fast_mark", Mark())


# ---------------------------------------------------------------- what a layer returns


class _Give(torch.autograd.Function):
    """The results of a layer: the same memory under other tensors, which may be changed in place and detached."""

    @staticmethod
    def forward(
        ctx: Any, ledger: Ledger, mark: Mark, sources: Any, penalty: Any, *results: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ledger, ctx.mark, ctx.sources = ledger, mark, sources
        if ledger.joins:
            ctx.shape, ctx.like = penalty.shape, penalty.new_empty(0)
        ctx.set_materialize_grads(False)
        return tuple(t.data for t in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        joined, reached = None, graph.reached(ctx.sources)
        if ctx.ledger.joins and _joins_now(ctx.mark, reached, ctx.sources):
            joined = ctx.ledger.share(ctx.mark, ctx.like).expand(ctx.shape)
        if reached is None or reached or not ctx.sources:
            ctx.mark.differentiated = True
        else:
            ctx.mark.in_part = True
        return None, None, None, joined, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tangents[4:]


def _gone(gradient: Tensor | None) -> bool:
    return gradient is None or (readable(gradient) and not gradient.any())


def _joins_now(note: Note, reached: set[int] | None, sources: list[Any]) -> bool:
    """Whether the penalty joins in this backward, given the nodes that it comes to, of weights and behind them: in each
    torch.autograd.grad that asks for weights, and for each weight in the first .backward() that reaches it."""
    joins = not note.spent and (reached is None or not reached <= note.joined)
    if reached and not joins:
        leaves = [sources[n].variable for n in reached if hasattr(sources[n], "variable")]
        if leaves and all(_gone(leaf.grad) for leaf in leaves):
            warn(_GONE)
    if joins and note.twice:
        raise RuntimeError(f"weight: {_TWICE}")
    note.twice = note.twice or (joins and torch.is_grad_enabled())
    note.joined |= reached or set()
    return joins


class _Level:
    """At which of the transforms of torch.func that run in each other a penalty has joined: an outer one, or a backward
    around all of them, differentiates what the inner one has made."""

    note: Note | None = None


class _GiveTransformed(torch.autograd.Function):
    """So for transforms of torch.func, at each of which it is a node."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ledger: Ledger, level: _Level, penalty: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.ledger, ctx.level, penalty, *_ = inputs
        ctx.shape, ctx.note = penalty.shape, Note(penalty, Round())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.level.note not in (None, ctx.note):
            raise RuntimeError(f"weight: {_TWICE}")
        ctx.level.note = ctx.note
        return None, None, ctx.ledger.share(ctx.note, grads[0]).expand(ctx.shape), *grads


# In a compiled function, which neither keeps nor reads Python's objects when it runs, operators do it.

ops.LIBRARY.define("note(Tensor penalty, int ledger, bool frozen) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
ops.LIBRARY.define("share(Tensor gradient, Tensor note) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
ops.LIBRARY.define("turn(Tensor penalty, int ledger) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
ops.LIBRARY.define("alone(Tensor penalty, int ledger) -> Tensor", tags=torch.Tag.cudagraph_unsafe)


class _GiveTraced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ledger: int, penalty: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        noted = torch.ops.sire_fast.note(penalty, ledger, False)
        ctx.shape = penalty.shape
        ctx.save_for_backward(noted)
        ctx.mark_non_differentiable(noted)
        return noted, *(t.clone() for t in results)

    @staticmethod
    def backward(ctx: Any, _: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share = torch.ops.sire_fast.share(grads[0], *ctx.saved_tensors)
        return None, share.expand(ctx.shape), *grads


@torch.library.impl("sire_fast::note", "CompositeExplicitAutograd")
def _note(penalty: Tensor, ledger: int, frozen: bool) -> Tensor:
    written = _ledgers[ledger]
    if graph.in_backward() and isinstance(graph.running("backward"), CheckpointFunction._backward_cls):
        raise RuntimeError(f"sire_fast: {_COMPILED_AGAIN}")
    written.traced = ()  # which would hold the note of the last run
    note = written.note(penalty)
    _notes[note.key] = note, written
    if len(_notes) > _NOTES:
        _notes.popitem(last=False)
    key = torch.tensor(note.key)
    if frozen:
        note.node = lambda: None
    elif not graph.is_kept_by_others():
        note.node = weakref.ref(key)
    return key


@torch.library.register_fake("sire_fast::note")
def _noted(penalty: Tensor, ledger: int, frozen: bool) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.impl("sire_fast::share", "CompositeExplicitAutograd")
def _share(gradient: Tensor, note: Tensor) -> Tensor:
    found = _notes.get(int(note))
    if found is None:
        raise RuntimeError(
            f"sire_fast: over {_NOTES} forwards of compiled layers came after this one: run its backward earlier"
        )
    noted, written = found
    written.traced = ()
    joins = not noted.joined
    noted.joined.add(0)
    return written.share(noted, gradient) * joins


@torch.library.register_fake("sire_fast::share")
def _shared(gradient: Tensor, note: Tensor) -> Tensor:
    return gradient.new_empty((), dtype=torch.promote_types(gradient.dtype, torch.float32))


@torch.library.impl("sire_fast::turn", "CompositeExplicitAutograd")
def _turn(penalty: Tensor, ledger: int) -> Tensor:
    _ledgers[ledger].turn()
    return penalty.clone()


@torch.library.register_fake("sire_fast::turn")
def _turned(penalty: Tensor, ledger: int) -> Tensor:
    return torch.empty_like(penalty)


torch.library.register_autograd("sire_fast::turn", lambda ctx, gradient: (gradient, None))


@torch.library.impl("sire_fast::alone", "CompositeExplicitAutograd")
def _alone(penalty: Tensor, ledger: int) -> Tensor:
    _ledgers[ledger].tell_if_not_alone()
    return penalty.clone()


torch.library.register_fake("sire_fast::alone", _turned)
torch.library.register_autograd("sire_fast::alone", lambda ctx, gradient: (gradient, None))


_traces: weakref.WeakKeyDictionary[TracingContext, set[int]] = weakref.WeakKeyDictionary()


def _first_in_trace(ledger: int) -> bool:
    """Whether this is the first pass of a layer in the function that is being compiled; asked once, while it is."""
    seen = _traces.setdefault(TracingContext.get(), set())
    first = ledger not in seen
    seen.add(ledger)
    return first


@functools.cache
def _prepare_compiler() -> None:
    """Let torch.compile trace subclasses of torch.nn's recurrent layers, which it otherwise never does. The switch is
    one for all: torch's own layers are traced then, too."""
    import torch._dynamo  # takes a second, which an optimiser needs as well

    torch._dynamo.config.allow_rnn = True
    torch.compiler.assume_constant_result(_first_in_trace)
