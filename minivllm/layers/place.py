"""Where a tensor of the checkpoint goes: which memory of this rank it fills, and with which of its
numbers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """What a tensor of the checkpoint fills: ``tensor = whole[index]``, for a whole of this shape.

    A rank of a group holds a part of many tensors, and so `tensor` is smaller than `shape` there.
    """

    tensor: torch.Tensor  # a parameter, or a view of some rows of one
    shape: torch.Size  # of the whole tensor in the checkpoint
    index: tuple[slice, ...] = ()  # of the part that this rank holds; () is all of it
