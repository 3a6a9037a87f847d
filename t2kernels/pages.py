"""Memory in pages of 2 MB: a product that reads all weights once looks up 512 times fewer addresses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

HUGE_PAGE = 1 << 21
MADV_COLLAPSE = 25  # Linux 6.1 and later


def collapse_pages(tensors: Iterable[Tensor]) -> int:
    """Asks Linux to move the memory of CPU tensors into pages of 2 MB; returns the bytes that lie in such pages now.

    Pages that hold parts of several tensors count once. Contents and addresses stay. It takes a few milliseconds a
    page, may run beside whatever uses the tensors, and does nothing where the system cannot do it.
    """
    pages = set[int]()
    for tensor in tensors:
        size = 0 if tensor.device.type != "cpu" else tensor.numel() * tensor.element_size()
        if size and tensor.is_contiguous():
            start = tensor.data_ptr()
            pages.update(range(start // HUGE_PAGE, (start + size - 1) // HUGE_PAGE + 1))
    if not sys.platform.startswith("linux"):
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    moved = sum(advise(page * HUGE_PAGE, HUGE_PAGE, MADV_COLLAPSE) == 0 for page in sorted(pages))
    return moved * HUGE_PAGE
