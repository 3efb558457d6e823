"""Memory of ended tensors: used again by one tensor at a time, up to a limit."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from pathlib import Path

import pytest
import torch

from upcycle.kernels.cpu import recycled_memory
from upcycle.kernels.cpu.recycled_memory import LEAST, Recycler

SHAPE = (64, 1024)


def test_an_ended_tensors_memory_is_the_next_ones() -> None:
    recycler = Recycler()
    first = recycler.empty(SHAPE, torch.float32)
    place, view = first.data_ptr(), first[3:5].T
    assert first.is_contiguous()
    assert first.untyped_storage().nbytes() == first.nbytes == 2**18
    del first
    assert recycler.waiting == 0, "a view holds it"
    other = recycler.empty(SHAPE, torch.float32)
    assert other.data_ptr() != place
    del view
    assert recycler.waiting == 2**18
    again = recycler.empty((2**17 - 5,), torch.bfloat16)  # another shape and dtype, and nearly as large
    assert again.data_ptr() == place
    assert recycler.waiting == 0
    bigger = recycler.empty((2 * 64, 1024), torch.float32)
    assert bigger.data_ptr() not in (place, other.data_ptr())


def test_small_and_huge_tensors_are_not_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = Recycler()
    monkeypatch.setattr(recycled_memory, "MOST", 2**19)
    for elements in (0, LEAST // 8, 2**18):
        assert recycler.empty((elements,), torch.float32).shape == (elements,)  # and ends here
        assert recycler.waiting == 0


def test_without_memory_what_waits_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = Recycler()
    recycler.empty(SHAPE, torch.float32)
    assert recycler.waiting

    def nothing_left(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", nothing_left)
    assert recycler.empty((3, *SHAPE), torch.float32).shape == (3, *SHAPE), "torch's own, or its own error"
    assert recycler.waiting == 0


def test_what_waits_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = Recycler()
    monkeypatch.setattr(recycled_memory, "MOST", 3 * 2**18)
    tensors = [recycler.empty(SHAPE, torch.float32) for _ in range(5)]
    newest = tensors[-1].data_ptr()
    while tensors:
        tensors.pop(0)
    assert recycler.waiting == 3 * 2**18
    assert recycler.empty(SHAPE, torch.float32).data_ptr() == newest, "its pages are the likeliest to be in the cache"


def test_sizes_of_a_little_difference_share() -> None:
    rounded = recycled_memory._rounded
    for size in (1, 4096, 2**18, 2**18 + 1, 3 * 2**20 + 17, 10**8):
        assert size <= rounded(size) < size + max(mmap.PAGESIZE, size / 8) + 1
        assert rounded(rounded(size)) == rounded(size)
        assert rounded(size) % mmap.PAGESIZE == 0


def test_as_a_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recycled_memory, "RECYCLER", Recycler())
    parameter = torch.nn.Parameter(torch.ones(SHAPE))
    gradient = recycled_memory.recycled_like(parameter).fill_(2)
    parameter.grad = gradient
    torch.optim.SGD([parameter], lr=0.25).step()
    assert (parameter == 0.5).all()
    torch.save(gradient, tmp_path / "gradient.pt")
    assert torch.equal(torch.load(tmp_path / "gradient.pt", weights_only=True), gradient)
    turned = torch.ones(SHAPE).T
    assert recycled_memory.recycled_like(turned).stride() == turned.stride()
    assert recycled_memory.recycled(torch.ones(3, device="meta"), *SHAPE).is_meta


def test_threads_and_cycles() -> None:
    recycler, wrong = Recycler(), []

    def work(number: int) -> None:
        for _ in range(200):
            tensor = recycler.empty(SHAPE, torch.float32).fill_(number)
            cycle: list[object] = [tensor]
            cycle.append(cycle)
            if not (tensor == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert 0 < recycler.waiting <= recycled_memory.MOST


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_a_copy() -> None:
    tensor = Recycler().empty(SHAPE, torch.float32).fill_(1)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the threads of torch's pool stayed behind
        tensor.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert (tensor == 1).all()
