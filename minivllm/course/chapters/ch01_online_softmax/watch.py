"""Watch where an answer reads, and how much it holds at once."""

from __future__ import annotations

import inspect
import math
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Read:
    """One operation that reads a watched tensor: its name, the rows that it takes in, in order, and
    how many numbers.
    """

    operation: str
    rows: tuple[int, ...]
    numbers: int


@dataclass
class Seen:
    """What an answer did.

    reads: watched tensor's name -> its reads, in order. largest: the shape of the largest tensor
    that was made, held: the most numbers that were held at once, in tensors and in Python's lists;
    both without the watched tensors.
    """

    reads: dict[str, list[Read]] = field(default_factory=dict)
    largest: tuple[int, ...] = ()
    held: int = 0

    def widest(self, name: str) -> Read:
        """The read of this tensor that takes in most rows."""
        return max(self.reads[name], key=lambda read: len(read.rows), default=Read("", (), 0))


def first_return(reads: list[Read], block: int) -> int | None:
    """The first row that is read again after its tile of `block` rows was left; None: there is
    none.
    """
    rank: dict[int, int] = {}
    for read in reads:
        for row in read.rows:
            if rank.setdefault(row, len(rank)) < len(rank) - block:
                return row
    return None


def watch(answer: Callable, args: tuple, watched: Mapping[str, torch.Tensor]) -> Seen:
    """Call answer(*args), and watch. watched: contiguous tensors among the arguments, by name."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    notes = _Notes(watched, inspect.unwrap(answer).__code__.co_filename)

    class Python(TorchFunctionMode):  # what goes to Python's own numbers
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            if name in ("tolist", "numpy", "__array__", "__dlpack__"):
                notes.busy = True  # what the notes compute is not the answer's
                notes.read(name.strip("_"), (args, kwargs))
                notes.busy = False
            return func(*args, **(kwargs or {}))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if notes.busy:
                return result
            if not notes.looks_into(result):  # else it is a view, which reads nothing
                notes.read(func.overloadpacket.__name__.strip("_"), (args, kwargs))
                notes.made(result)
            return result

    with Python(), Watch():
        answer(*args)
    return notes.seen


class _Notes:
    """Fills a `Seen`."""

    def __init__(self, watched: Mapping[str, torch.Tensor], filename: str) -> None:
        import torch

        self.busy = False
        self._filename = filename
        self.seen = Seen({name: [] for name in watched})
        self._names = {t.untyped_storage().data_ptr(): name for name, t in watched.items()}
        self._widths = {name: math.prod(t.shape[1:]) for name, t in watched.items()}
        self._places = {name: torch.arange(t.numel()) for name, t in watched.items()}
        self._alive: dict[int, tuple[Any, int]] = {}

    def looks_into(self, tree: Any) -> bool:
        """Whether a result is a view of a watched tensor."""
        return any(t.untyped_storage().data_ptr() in self._names for t in _tensors(tree))

    def read(self, operation: str, tree: Any) -> None:
        for tensor in _tensors(tree):
            name = self._names.get(tensor.untyped_storage().data_ptr())
            if name is None or not tensor.numel():
                continue
            layout = tensor.shape, tensor.stride(), tensor.storage_offset()
            places = self._places[name].as_strided(*layout).unique()
            rows = (places // self._widths[name]).unique()
            self.seen.reads[name].append(Read(operation, tuple(rows.tolist()), len(places)))
            self.seen.held = max(self.seen.held, _in_lists(self._filename))

    def made(self, tree: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            numbers = storage.nbytes() // max(1, tensor.element_size())
            self._alive[storage._cdata] = StorageWeakRef(storage), numbers
            if tensor.numel() > math.prod(self.seen.largest or (0,)):
                self.seen.largest = tuple(tensor.shape)
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.seen.held = max(self.seen.held, sum(numbers for _, numbers in self._alive.values()))


def _in_lists(filename: str) -> int:
    """How many floats the variables of the running functions of this file hold in lists."""
    frame, found = sys._getframe(1), 0
    while frame:
        if frame.f_code.co_filename == filename:
            found += sum(_floats(value) for value in frame.f_locals.values())
        frame = frame.f_back
    return found


def _floats(value: Any, depth: int = 4) -> int:
    if isinstance(value, array):
        return len(value)
    items = value.values() if isinstance(value, dict) else value
    if not depth or not isinstance(value, list | tuple | set | dict | deque):
        return 0
    return sum(1 if isinstance(x, float) else _floats(x, depth - 1) for x in items)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    import torch
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
