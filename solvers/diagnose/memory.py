"""How much memory a computation needs at its peak."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_memory(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensor memory that were alive at once during `run()`, above what was alive before.

    On CUDA it is the allocator's own count. Elsewhere every storage that an operator makes is followed from its birth
    to its death: exact and the same in every run, but blind to what an operator needs inside itself (the workspace of
    a convolution). Storages that existed before are not counted, even where `run` frees them.

    Args:
        run: what is measured; its result is dropped.
        device: where it computes.

    Returns:
        Bytes.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveStorages() as storages:
        run()
    return storages.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators make, for as long as they live.

    Attributes:
        live: bytes alive now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view of a tensor from before is no new memory.
        for tensor in pytree.tree_leaves((args, kwargs)):
            self._see(tensor, ours=False)
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            self._see(tensor, ours=True)
        return result

    def _see(self, tensor: Any, ours: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if ours else 0
        self._known[key] = weakref.ref(storage, functools.partial(self._forget, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._known[key]
