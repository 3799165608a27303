"""Adapters that are wrong in one way each, and the code that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def _edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / _WEIGHTS)), folder / _WEIGHTS)


def _wrong_shapes(folder: Path) -> None:
    _edit(folder, lambda ts: {k: torch.zeros(t.shape[0], 7) for k, t in ts.items()})


def _nan(folder: Path) -> None:
    _edit(
        folder,
        lambda ts: {k: t.index_fill(0, torch.tensor([0]), float("nan")) for k, t in ts.items()},
    )


def _no_lora_b(folder: Path) -> None:
    _edit(folder, lambda ts: {k: t for k, t in ts.items() if "lora_B" not in k})


def _unknown_target(folder: Path) -> None:
    _edit(folder, lambda ts: {k.replace("q_proj", "z_proj"): t for k, t in ts.items()})


def _rank_over_envelope(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))
    _edit(
        folder,
        lambda ts: {
            k: torch.zeros(64, t.shape[1]) if "lora_A" in k else torch.zeros(t.shape[0], 64)
            for k, t in ts.items()
        },
    )


def _truncated(folder: Path) -> None:
    data = (folder / _WEIGHTS).read_bytes()
    (folder / _WEIGHTS).write_bytes(data[: len(data) // 2])


def _bin(folder: Path) -> None:
    (folder / _WEIGHTS).rename(folder / "adapter_model.bin")


def _missing_weights(folder: Path) -> None:
    (folder / _WEIGHTS).unlink()


def _missing(folder: Path) -> None:
    shutil.rmtree(folder)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "wrong_shapes": (_wrong_shapes, "shape_mismatch"),
    "rank_over_envelope": (_rank_over_envelope, "rank_over_envelope"),
    "unknown_target": (_unknown_target, "target_outside_envelope"),
    "nan": (_nan, "non_finite"),
    "truncated": (_truncated, "adapter_format"),
    "bin": (_bin, "adapter_format"),
    "missing_weights": (_missing_weights, "adapter_not_found"),
    "missing": (_missing, "adapter_not_found"),
    "no_lora_b": (_no_lora_b, "missing_tensor"),
}


def make_bad(kind: str, *, like: Path, folder: Path) -> Path:
    """A copy of the adapter `like`, spoilt."""
    path = folder / kind
    shutil.copytree(like, path)
    BAD[kind][0](path)
    return path
