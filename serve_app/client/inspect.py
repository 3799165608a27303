"""`hotswap inspect`: adapters as a JSON document and as a table, and an envelope for all of them.

Reads the adapters itself, and so needs torch, as no other command does; `cli` imports this module
for `inspect` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, Field
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hotswap_lib import (
    Adapter,
    Envelope,
    HotswapError,
    PaddingCost,
    inspect_adapter,
    load_adapter,
    padding_cost,
    sketch_layout,
    suggest_envelope,
)
from serve_app.client.terminal_text import RevisionCell

__all__ = ["HotswapError", "InspectionDocument", "inspect", "inspection_screen"]


class EnvelopeView(BaseModel):
    """The smallest envelope for all adapters, with the names of the server's settings."""

    max_rank: int
    target_modules: list[str]
    modules_to_save: list[str] | None
    use_dora: bool
    bias: str
    lora_bias: bool


class CostView(BaseModel):
    """The size of one adapter's image in that envelope, by cause."""

    image_bytes: int
    own_bytes: int = Field(description="the adapter's values, in the slot's dtype")
    rank_bytes: int = Field(description="zeros up to the envelope's rank")
    absent_bytes: int = Field(description="zeros for modules that the adapter lacks")
    gap_bytes: int = Field(description="alignment between tensors")


class InspectedAdapter(BaseModel):
    """One adapter, read from its files."""

    source: str
    revision: str = Field(description="name@digest8")
    digest: str
    base_model: str | None
    ranks: dict[str, int] = Field(description="module → rank")
    scalings: dict[str, float]
    dtypes: dict[str, int] = Field(description="dtype → stored bytes")
    features: list[str]
    nbytes: int
    cost: CostView


class InspectionDocument(BaseModel):
    """All adapters, and one envelope for them."""

    adapters: list[InspectedAdapter]
    envelope: EnvelopeView


def inspect(sources: Sequence[str]) -> InspectionDocument:
    """Read the adapters at `sources`: paths, URIs or Hub ids.

    Raises:
        HotswapError: an adapter cannot be read, or no envelope fits all of them.
    """
    adapters = [load_adapter(os.path.expanduser(source)) for source in sources]
    envelope = suggest_envelope(adapters)
    layout = sketch_layout(adapters, envelope)
    return InspectionDocument(
        adapters=[
            _view(source, adapter, padding_cost(adapter, layout))
            for source, adapter in zip(sources, adapters, strict=True)
        ],
        envelope=_envelope_view(envelope),
    )


def _view(source: str, adapter: Adapter, cost: PaddingCost) -> InspectedAdapter:
    found = inspect_adapter(adapter)
    return InspectedAdapter(
        source=source,
        revision=str(found.revision),
        digest=found.revision.digest,
        base_model=found.base_model,
        ranks=dict(found.ranks),
        scalings=dict(found.scalings),
        dtypes=dict(found.dtypes),
        features=list(found.features),
        nbytes=found.nbytes,
        cost=CostView(
            image_bytes=cost.image_bytes,
            own_bytes=cost.own_bytes,
            rank_bytes=cost.rank_bytes,
            absent_bytes=cost.absent_bytes,
            gap_bytes=cost.gap_bytes,
        ),
    )


def _envelope_view(envelope: Envelope) -> EnvelopeView:
    targets, saved = envelope.target_modules, envelope.modules_to_save
    return EnvelopeView(
        max_rank=envelope.max_rank,
        target_modules=[targets] if isinstance(targets, str) else list(targets),
        modules_to_save=None if saved is None else list(saved),
        use_dora=envelope.use_dora,
        bias=envelope.bias,
        lora_bias=envelope.lora_bias,
    )


_NUMBERS = ("layers", "size", "own share")


def inspection_screen(document: InspectionDocument) -> RenderableType:
    """A table with a row for each adapter, then the envelope."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("revision", "layers", "rank", "dtype", "features", "size", "own share"):
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for one in document.adapters:
        table.add_row(
            RevisionCell(one.revision),
            str(len(one.ranks)),
            _range(one.ranks.values()),
            ", ".join(one.dtypes),
            ", ".join(one.features) or "-",
            _mb(one.nbytes),
            f"{one.cost.own_bytes / one.cost.image_bytes:.0%}",
        )
    bases = sorted({one.base_model or "unknown" for one in document.adapters})
    image = _mb(max(one.cost.image_bytes for one in document.adapters))
    notes = f"base model: {', '.join(bases)}\nsmallest envelope: {_settings(document.envelope)}"
    notes += f"\nan image takes {image} in it; own share: the part that is the adapter's own values"
    return Group(table, Text(notes))


def _settings(envelope: EnvelopeView) -> str:
    """The envelope as arguments of `serve run`."""
    words = [f"max_rank={envelope.max_rank}", f"target_modules={','.join(envelope.target_modules)}"]
    if envelope.modules_to_save:
        words.append(f"modules_to_save={','.join(envelope.modules_to_save)}")
    words += [f"{flag}=true" for flag in ("use_dora", "lora_bias") if getattr(envelope, flag)]
    if envelope.bias != "none":
        words.append(f"bias={envelope.bias}")
    return " ".join(words)


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
