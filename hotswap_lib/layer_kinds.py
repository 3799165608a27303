"""The LoRA layer classes that a slot supports, and the tensors of each.

A class that is not in `KINDS` is rejected by name. A new kind of layer needs a row here and one in
the support table of this package's README; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer

from . import peft_internals
from .layout import Padding


@dataclass(frozen=True, slots=True)
class Role:
    """One tensor of a LoRA layer.

    Attributes:
        container: the layer's attribute that holds it for each adapter.
        attribute: the parameter's name there; None where the container holds it itself.
        rank_dim: the dimension that is the rank; None if no dimension is.
    """

    container: str
    attribute: str | None
    rank_dim: int | None

    @property
    def suffix(self) -> str:
        """The end of its key in a PEFT checkpoint."""
        return self.container if self.attribute is None else f"{self.container}.{self.attribute}"


_MATRICES = (
    Role("lora_A", "weight", rank_dim=0),  # (rank, in), for convolutions (rank, in, *kernel)
    Role("lora_B", "weight", rank_dim=1),  # (out, rank), for convolutions (out, rank, 1, ...)
)
_EMBEDDING = (
    Role("lora_embedding_A", None, rank_dim=0),  # (rank, vocabulary)
    Role("lora_embedding_B", None, rank_dim=1),  # (hidden, rank)
)
LORA_BIAS = Role("lora_B", "bias", rank_dim=None)  # (out,)

EMBEDDING = "layer.Embedding"
KINDS: Mapping[str, tuple[Role, ...]] = {
    "layer.Linear": _MATRICES,  # over torch.nn.Linear and over transformers' Conv1D
    EMBEDDING: _EMBEDDING,
    "layer.Conv1d": _MATRICES,
    "layer.Conv2d": _MATRICES,
    "layer.Conv3d": _MATRICES,
    # quantized base layers; their adapters are ordinary matrices
    "bnb.Linear8bitLt": _MATRICES,
    "bnb.Linear4bit": _MATRICES,
    "torchao.TorchaoLoraLinear": _MATRICES,
    "gptq.GPTQLoraLinear": _MATRICES,
    "awq.AwqLoraLinear": _MATRICES,
    "aqlm.AqlmLoraLinear": _MATRICES,
    "eetq.EetqLoraLinear": _MATRICES,
    "hqq.HqqLoraLinear": _MATRICES,
    "inc.IncLoraLinear": _MATRICES,
}


def is_supported(layer: LoraLayer) -> bool:
    """True if the layer's class is in `KINDS`."""
    return peft_internals.layer_kind(layer) in KINDS


def is_embedding(layer: LoraLayer) -> bool:
    """True for LoRA over an embedding."""
    return peft_internals.layer_kind(layer) == EMBEDDING


def roles(layer: LoraLayer, *, lora_bias: bool) -> tuple[Role, ...]:
    """The tensors of a supported layer."""
    found = KINDS[peft_internals.layer_kind(layer)]
    # embeddings have no lora_B module that could hold a bias
    return (*found, LORA_BIAS) if lora_bias and found is _MATRICES else found


def padding(layer: LoraLayer, role: Role, max_rank: int) -> Padding | None:
    """The padding of one tensor; None where its shape does not depend on the rank.

    A grouped convolution gives each of its groups an equal share of the ranks
    (peft.tuners.lora.layer._ConvNd: lora_B is grouped and lora_A is not), so each share is padded
    on its own.
    """
    if role.rank_dim is None:
        return None
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if role.container == "lora_A":
        return Padding(dim=role.rank_dim, max_rank=max_rank, groups=groups)
    return Padding(dim=role.rank_dim, max_rank=max_rank, per_index=groups)
