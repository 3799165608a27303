"""Host memory for whole adapters: zeroed and aligned.

numpy asks the kernel for huge pages for large arrays, torch does not. The first touch of a 42 MB
buffer then costs 20 page faults instead of 10,000, which take longer than writing the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Inductor clones inputs that are not 16-byte aligned on every call, and 64 is a cache line.
ALIGNMENT = 64

Bytes = npt.NDArray[np.uint8]


def allocate(nbytes: int) -> Bytes:
    """A writable uint8 array of ``nbytes`` zeros, one dimension, aligned like a slot's tensors."""
    raw = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)  # numpy itself aligns to 16 bytes only
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
