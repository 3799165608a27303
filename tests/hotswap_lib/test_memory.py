from __future__ import annotations

import numpy as np
import pytest
import torch

from hotswap_lib.memory import ALIGNMENT, allocate, row_major


@pytest.mark.parametrize("nbytes", [0, 1, 64, 4097, 5 << 20])
def test_memory_is_zeroed_and_aligned_and_of_the_size_asked_for(nbytes: int) -> None:
    memory = allocate(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.dtype == np.uint8
    assert not memory.any()
    assert nbytes == 0 or memory.ctypes.data % ALIGNMENT == 0


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_row_major_strides_are_those_of_a_contiguous_tensor(shape: tuple[int, ...]) -> None:
    assert row_major(shape) == torch.empty(shape).stride()
