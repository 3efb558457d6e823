"""Whether a tensor is memory that code outside torch may read and write by its address."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all of them (``None`` counts) are numbers in this process's memory, where their strides say.

    Not so are subclasses, whose numbers are elsewhere or differ from what their dtype says (DTensor, quantised weights, fake tensors),
    tensors on other devices, those that a function transform wraps, and those whose memory was given back while their shape stayed, as
    weights that are divided among ranks between two uses.
    """
    return all(tensor is None or _is_plain(tensor) for tensor in tensors)


def is_subclass(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor's class is a subclass with rules of its own (DTensor, quantised weights); fake tensors do not count."""
    return tensor is not None and type(tensor) not in _TYPES and not isinstance(tensor, FakeTensor)


def without_numbers(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them has a shape and a dtype but no numbers, on the meta device or as a fake tensor."""
    return any(tensor is not None and (tensor.is_meta or isinstance(tensor, FakeTensor)) for tensor in tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    # Asked of every tensor for every token: what is cheap to know comes first.
    if type(tensor) not in _TYPES or not tensor.is_cpu or tensor.layout is not torch.strided:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_neg():
        return False
    count = tensor.numel()
    if count == 0:
        return True
    if tensor.is_contiguous():
        last = count - 1
    else:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + last + 1) * tensor.itemsize
