"""Pooling: one vector for a text, from the vectors of its tokens."""

from __future__ import annotations

from typing import Literal

import torch

Pooling = Literal["mean", "cls", "last"]


def pool(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One float32 vector for each row, [B, D]. Rows are padded at their end.

    `hidden_BLD`: the model's last hidden state. `mask_BL`: 1 for a token, 0 for padding.
    """
    hidden_BLD = hidden_BLD.float()
    if pooling == "cls":
        return hidden_BLD[:, 0]
    length_B1 = mask_BL.sum(1, keepdim=True)
    if pooling == "last":
        last_B1D = (length_B1 - 1)[..., None].expand(-1, -1, hidden_BLD.size(-1))
        return hidden_BLD.gather(1, last_B1D).squeeze(1)
    return (hidden_BLD * mask_BL[..., None]).sum(1) / length_B1
