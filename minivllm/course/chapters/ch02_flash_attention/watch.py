"""Watch what torch does while an answer computes attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import is_tensor
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    import torch

#: Ways out of torch.
_OUT = ("numpy", "tolist", "__array__")


@dataclass
class Seen:
    """What was made on the way.

    largest: numbers in the largest tensor. scores: numbers in the largest tensor of scores: one
    that was computed from queries and keys, and not from values. held: numbers in all tensors of
    scores that existed at one time. products: for each product of queries with keys, how many there
    were of each. fused: an attention function of torch that was called. left: how the numbers left
    torch. low: a dtype of less than float32.
    """

    largest: int = 0
    scores: int = 0
    held: int = 0
    products: list[tuple[int, int]] = field(default_factory=list)
    fused: str = ""
    left: str = ""
    low: str = ""


class _Origins:
    """For each storage, which of the inputs its numbers depend on; and which of them still live."""

    def __init__(self, **inputs: torch.Tensor) -> None:
        self._known = {self._place(tensor): frozenset((name,)) for name, tensor in inputs.items()}
        self._alive: dict[int, tuple[list[weakref.ref], int]] = {}

    @staticmethod
    def _place(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._known.get(self._place(tensor), frozenset()) if tensor.numel() else frozenset()

    def note(self, result: torch.Tensor, inputs: list[torch.Tensor]) -> frozenset[str]:
        """Note a result that was computed from these tensors. A view belongs to what it views."""
        names = frozenset().union(*map(self.of, inputs))
        place = self._place(result)
        if result.numel():
            if place in map(self._place, inputs):
                names |= self.of(result)
            self._known[place] = names
        return names

    def held(self, result: torch.Tensor) -> int:
        """Note a tensor of scores. The numbers in all that still live, this one included."""
        self._alive = {
            place: (alive, size)
            for place, (refs, size) in self._alive.items()
            if (alive := [ref for ref in refs if ref() is not None])
        }
        refs, _ = self._alive.setdefault(self._place(result), ([], result.numel()))
        refs.append(weakref.ref(result))
        return sum(size for _, size in self._alive.values())


def watch(
    function: Callable,
    *args: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dim: int,
) -> Seen:
    """Run function(*args) and watch.

    query, key, value: those of the arguments that hold queries, keys and values. dim: the numbers
    in one query and in one key.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen, origins = Seen(), _Origins(query=query, key=key, value=value)

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            if "attention" in name:
                seen.fused = name
            if name in _OUT and is_tensor(args[0]) and origins.of(args[0]):
                seen.left = name
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            inputs = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
            if "attention" in func.overloadpacket.__name__:
                seen.fused = func.overloadpacket.__name__
            self.note_product(inputs)
            result = func(*args, **(kwargs or {}))
            for tensor in filter(is_tensor, tree_leaves(result)):
                self.note_result(tensor, inputs)
            return result

        def note_product(self, inputs: list[torch.Tensor]) -> None:
            sides = {origins.of(x): x.numel() // dim for x in inputs}
            queries, keys = (sides.get(frozenset((name,)), 0) for name in ("query", "key"))
            if queries and keys:
                seen.products.append((queries, keys))

        def note_result(self, tensor: torch.Tensor, inputs: list[torch.Tensor]) -> None:
            names = origins.note(tensor, inputs)
            seen.largest = max(seen.largest, tensor.numel())
            if names and tensor.dtype in (torch.float16, torch.bfloat16):
                seen.low = str(tensor.dtype).removeprefix("torch.")
            if names == {"query", "key"}:
                seen.scores = max(seen.scores, tensor.numel())
                seen.held = max(seen.held, origins.held(tensor))

    with Names(), Operations():
        function(*args)
    return seen


def expect_own_attention(seen: Seen) -> None:
    """Require that torch's own attention did not do it, nor NumPy, nor half precision."""
    expect(
        not seen.fused,
        "done-by-torch",
        f"The result is right, but {seen.fused} made it.\nHere you build what stands behind it.",
    )
    expect(
        not seen.left,
        "left-torch",
        f"The result is right, but queries, keys or values leave torch with `{seen.left}`, so the"
        " check cannot see what you hold.\nCompute with tensors.",
    )
    expect(
        not seen.low,
        "low-precision",
        f"The result is nearly right: on the way there are numbers in {seen.low}.\nCompute in"
        " float32, the dtype of the inputs.",
    )


def expect_small(seen: Seen, where: str, pairs: int, strip: int, tile: int, shape: str) -> None:
    """Require that no tensor held the matrix or a strip of it, and none of scores more than a tile.

    where: the case, in words. pairs, strip, tile: numbers in these. shape: of the tile, in words.
    """
    expect(
        seen.largest < pairs,
        "whole-matrix",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way.\n"
        f"{where} that is the whole matrix (a mask counts, too). Hold a tile of {shape} scores at a"
        " time.",
    )
    large = max(seen.scores, seen.largest if seen.largest >= strip else 0)
    expect(
        large <= tile,
        "whole-rows",
        f"The result is right, but a tensor of {large:,} scores (or a mask of so many) was made on"
        f" the way.\n{where} that is more than a tile of {shape}. The keys come in tiles, with a"
        " running maximum and sum.",
    )
    expect(
        seen.held <= 10 * tile,
        "tiles-are-kept",
        f"The result is right, but tensors with {seen.held:,} scores existed at one time.\n{where}"
        f" that is far more than a tile of {shape}. Let go of a tile's scores before the next one:"
        " maximum, sum and output are all that a walk needs to carry.",
    )
