"""What torch tells, mostly under private names, of the graph that autograd builds, of a backward that runs, and of what
is around a call. A node is a `grad_fn`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

NO_BACKWARD = -1


def this_backward() -> int:
    """A number of the backward that runs, NO_BACKWARD outside of all."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    return this_backward() != NO_BACKWARD


def in_transform() -> bool:
    """Whether a transform of torch.func is around this call."""
    return torch._C._are_functorch_transforms_active()


def in_mode() -> bool:
    """Whether a mode sees every operation: a trace, say, or a counter."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_kept_by_others() -> bool:
    """Whether what is saved for a backward goes through hooks: those of a checkpoint, say, which does not save it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def when_backward_ends(call: Callable[[], None]) -> None:
    """From within it."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def runs_again() -> Any:
    """The node of a custom function of autograd whose forward this is, without gradients, and which a backward runs
    again with them, as a checkpoint with use_reentrant=True does; None if there is none."""
    return running("forward")


def running(method: str) -> Any:
    """The node of the custom function of autograd whose method (forward, backward) runs; if one runs in another, of the
    outermost. None if none does."""
    frame: FrameType | None = sys._getframe(1)
    outermost = None
    while frame is not None:
        if frame.f_code.co_name == method:
            node = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
            if isinstance(node, torch.autograd.function.FunctionCtx):
                outermost = node
        frame = frame.f_back
    return outermost


def node_of(weight: Tensor) -> Any:
    """At which the gradient of a weight arrives."""
    if weight.grad_fn is not None:
        return weight.grad_fn
    view: Any = weight.view_as(weight).grad_fn
    return view.next_functions[0][0]


def reached(sources: list[Any]) -> set[int] | None:
    """The numbers of nodes that this backward comes to; None in a torch.autograd.grad that asks for the weights."""
    try:
        return {n for n, node in enumerate(sources) if torch._C._will_engine_execute_node(node)}
    except RuntimeError:  # which is how the engine says so of a leaf
        return None


def freed(tensor: Tensor) -> bool:
    """Whether a backward has freed the graph of a tensor that a compiled function returned."""
    return _holds(behind(tensor.grad_fn)) is False


def kept(node: Any) -> bool:
    """Whether the graph of what a forward returned, given its last node, is there and was not freed."""
    return node is not None and _holds([node]) is True


def _holds(nodes: Iterable[Any]) -> bool | None:
    """Whether the first of the nodes that can tell holds what its backward needs; None if none can."""
    for node in nodes:
        if hasattr(type(node), "_raw_saved_tensors"):
            try:
                return node._raw_saved_tensors is not None
            except RuntimeError:
                return False
    return None


def behind(node: Any) -> Iterator[Any]:
    """A node of the graph, if it is one, and those that a backward comes to after it, the first 64."""
    nodes = [] if node is None else [node]
    for one in nodes:
        yield one
        nodes += [n for n, _ in one.next_functions if n is not None][: 64 - len(nodes)]


def left(tensor: Tensor) -> bool:
    """Whether a tensor is of a torch.func.grad that is over."""
    return torch._C._functorch.maybe_get_level(tensor) == -2


def versions(weights: list[Tensor]) -> list[int]:
    """That of each, which changes with it; those of torch.inference_mode() have none."""
    return [0 if w.is_inference() else w._version for w in weights]
