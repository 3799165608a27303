"""Swap LoRA adapters inside a live, compiled PEFT model: exactly, atomically, with one copy.

The stages, each with its own type: source (`Adapter`) → pack (`AdapterImage`) → stage (`Staged`)
→ commit (`Receipt`). Every check of an adapter comes before the commit.

Names are imported on first use: a process that needs only errors, revisions and envelopes does not
import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .envelope import Envelope
    from .errors import (
        AdapterConfigInvalid,
        AdapterFormatRefused,
        AdapterMerged,
        AdapterNameInvalid,
        AdapterNotFound,
        AdapterRefused,
        AlreadyCompiled,
        FeatureOutsideEnvelope,
        ForeignStaged,
        HotswapError,
        ImageCorrupted,
        ImageRefused,
        ImageUnreadable,
        InvalidEnvelope,
        LayoutMismatch,
        MissingTensor,
        NonFinite,
        NothingToRollBack,
        NotPrepared,
        RankMismatch,
        RankOverEnvelope,
        RecompiledAfterWarmup,
        ShapeMismatch,
        SlotTensorMoved,
        TargetOutsideEnvelope,
        VerifyFailed,
    )
    from .guard import CompileGuard
    from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from .image import AdapterImage, null_image, pack
    from .image_file import load_image, save_image
    from .inspection import (
        Inspection,
        PaddingCost,
        inspect_adapter,
        padding_cost,
        sketch_layout,
        suggest_envelope,
    )
    from .layout import Layout
    from .preparation import prepare
    from .revision import BASE, Revision
    from .slot import Receipt, Slot
    from .source import Adapter, load_adapter
    from .staging import Staged

__all__ = [
    "BASE",
    "Adapter",
    "AdapterConfigInvalid",
    "AdapterFormatRefused",
    "AdapterImage",
    "AdapterMerged",
    "AdapterNameInvalid",
    "AdapterNotFound",
    "AdapterRefused",
    "AlreadyCompiled",
    "CompileGuard",
    "Envelope",
    "FeatureOutsideEnvelope",
    "ForeignStaged",
    "HotswapError",
    "ImageCorrupted",
    "ImageRefused",
    "ImageUnreadable",
    "Inspection",
    "InvalidEnvelope",
    "Layout",
    "LayoutMismatch",
    "MissingTensor",
    "NonFinite",
    "NotPrepared",
    "NothingToRollBack",
    "PaddingCost",
    "RankMismatch",
    "RankOverEnvelope",
    "Receipt",
    "RecompiledAfterWarmup",
    "Revision",
    "ShapeMismatch",
    "Slot",
    "SlotTensorMoved",
    "Staged",
    "TargetOutsideEnvelope",
    "VerifyFailed",
    "hotswap_adapter",
    "inspect_adapter",
    "load_adapter",
    "load_image",
    "null_image",
    "pack",
    "padding_cost",
    "prepare",
    "prepare_model_for_compiled_hotswap",
    "save_image",
    "sketch_layout",
    "suggest_envelope",
]

# module → its public names
_PUBLIC = {
    "envelope": ("Envelope",),
    "errors": (
        "AdapterConfigInvalid",
        "AdapterFormatRefused",
        "AdapterMerged",
        "AdapterNameInvalid",
        "AdapterNotFound",
        "AdapterRefused",
        "AlreadyCompiled",
        "FeatureOutsideEnvelope",
        "ForeignStaged",
        "HotswapError",
        "ImageCorrupted",
        "ImageRefused",
        "ImageUnreadable",
        "InvalidEnvelope",
        "LayoutMismatch",
        "MissingTensor",
        "NonFinite",
        "NothingToRollBack",
        "NotPrepared",
        "RankMismatch",
        "RankOverEnvelope",
        "RecompiledAfterWarmup",
        "ShapeMismatch",
        "SlotTensorMoved",
        "TargetOutsideEnvelope",
        "VerifyFailed",
    ),
    "guard": ("CompileGuard",),
    "hotswap": ("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
    "image": ("AdapterImage", "null_image", "pack"),
    "image_file": ("load_image", "save_image"),
    "inspection": (
        "Inspection",
        "PaddingCost",
        "inspect_adapter",
        "padding_cost",
        "sketch_layout",
        "suggest_envelope",
    ),
    "layout": ("Layout",),
    "preparation": ("prepare",),
    "revision": ("BASE", "Revision"),
    "slot": ("Receipt", "Slot"),
    "source": ("Adapter", "load_adapter"),
    "staging": ("Staged",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # a module: `hotswap_lib.errors`
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # later lookups do not call this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
