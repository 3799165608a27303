"""Every error of hotswap_lib. Needs no torch. Each is raised before any live weight has changed.

    HotswapError                          code
    ├── AdapterRefused                    unsupported_adapter
    │   ├── AdapterNotFound               adapter_not_found
    │   ├── AdapterConfigInvalid          adapter_config_invalid
    │   ├── AdapterFormatRefused          adapter_format
    │   ├── AdapterNameInvalid            adapter_name_invalid
    │   ├── ShapeMismatch                 shape_mismatch
    │   ├── RankOverEnvelope              rank_over_envelope
    │   ├── RankMismatch                  rank_mismatch
    │   ├── TargetOutsideEnvelope         target_outside_envelope
    │   ├── FeatureOutsideEnvelope        feature_outside_envelope
    │   ├── NonFinite                     non_finite
    │   └── MissingTensor                 missing_tensor
    ├── InvalidEnvelope                   invalid_envelope
    ├── ImageRefused                      image_refused
    │   ├── LayoutMismatch                layout_mismatch
    │   ├── ImageCorrupted                image_corrupted
    │   └── ImageUnreadable               image_unreadable
    ├── ForeignStaged                     foreign_staged
    ├── NothingToRollBack                 nothing_to_roll_back
    ├── NotPrepared                       not_prepared
    ├── AlreadyCompiled                   already_compiled
    ├── AdapterMerged                     adapter_merged
    ├── VerifyFailed                      verify_failed
    │   └── SlotTensorMoved               slot_tensor_moved
    └── RecompiledAfterWarmup             recompiled_after_warmup

Errors cross process boundaries: the arguments are positional and the sentence is built in
``__str__``, so each error survives ``pickle``. ``code`` never changes for a given class and may be
sent to clients.
"""

from __future__ import annotations

from typing import ClassVar


class HotswapError(Exception):
    """The root of the tree: catches every error of this library."""

    code: ClassVar[str] = "hotswap_error"


class AdapterRefused(HotswapError):
    """An adapter breaks a rule.

    Args:
        adapter: its name.
        tensor: the tensor's checkpoint key, if one tensor is at fault.
        rule: the rule, as the end of a sentence about the adapter or the tensor.
    """

    code = "unsupported_adapter"

    def __init__(self, adapter: str, tensor: str | None, rule: str) -> None:
        super().__init__(adapter, tensor, rule)
        self.adapter = adapter
        self.tensor = tensor
        self.rule = rule

    def __str__(self) -> str:
        where = f", tensor {self.tensor!r}" if self.tensor is not None else ""
        return f"adapter {self.adapter!r}{where}: {self.rule}"


class AdapterNotFound(AdapterRefused):
    """There is no adapter at the given path, URI or Hub id, or it cannot be read."""

    code = "adapter_not_found"


class AdapterConfigInvalid(AdapterRefused):
    """``adapter_config.json`` is missing, is not JSON, is not LoRA, or has an invalid value."""

    code = "adapter_config_invalid"


class AdapterFormatRefused(AdapterRefused):
    """The weights are a pickle, or a truncated or corrupt safetensors file."""

    code = "adapter_format"


class AdapterNameInvalid(AdapterRefused):
    """The name cannot be part of a revision: see `hotswap_lib.revision.Revision`."""

    code = "adapter_name_invalid"


class ShapeMismatch(AdapterRefused):
    """A tensor was trained on a base layer of another size."""

    code = "shape_mismatch"


class RankOverEnvelope(AdapterRefused):
    """The adapter's rank is above the envelope's highest rank."""

    code = "rank_over_envelope"


class RankMismatch(AdapterRefused):
    """The configured rank is not the rank that the tensors have."""

    code = "rank_mismatch"


class TargetOutsideEnvelope(AdapterRefused):
    """The adapter has LoRA on a module that is not one of the envelope's targets."""

    code = "target_outside_envelope"


class FeatureOutsideEnvelope(AdapterRefused):
    """The adapter uses DoRA, a bias, saved modules, ... that the envelope does not allow."""

    code = "feature_outside_envelope"


class NonFinite(AdapterRefused):
    """A weight is NaN or infinite, as stored or once it is cast to the slot's dtype."""

    code = "non_finite"


class MissingTensor(AdapterRefused):
    """One half of a LoRA pair is absent, or there is no LoRA tensor at all."""

    code = "missing_tensor"


class InvalidEnvelope(HotswapError):
    """The envelope is invalid, or this model cannot hold it."""

    code = "invalid_envelope"

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(field, rule)
        self.field = field
        self.rule = rule

    def __str__(self) -> str:
        return f"envelope field {self.field!r}: {self.rule}"


class ImageRefused(HotswapError):
    """The slot does not accept the image."""

    code = "image_refused"

    def __init__(self, revision: str, rule: str) -> None:
        super().__init__(revision, rule)
        self.revision = revision
        self.rule = rule

    def __str__(self) -> str:
        return f"image of {self.revision}: {self.rule}"


class LayoutMismatch(ImageRefused):
    """The image was packed for another layout: another model, or another envelope."""

    code = "layout_mismatch"


class ImageCorrupted(ImageRefused):
    """The image's bytes changed since it was packed."""

    code = "image_corrupted"


class ImageUnreadable(ImageRefused):
    """The file is not an image. ``revision`` is its path."""

    code = "image_unreadable"


class ForeignStaged(ImageRefused):
    """The staged image belongs to another slot."""

    code = "foreign_staged"


class NothingToRollBack(HotswapError):
    """A rollback needs an image that was live before the current one."""

    code = "nothing_to_roll_back"

    def __init__(self, revision: str) -> None:
        super().__init__(revision)
        self.revision = revision

    def __str__(self) -> str:
        return f"{self.revision} is live and nothing was live before it"


class NotPrepared(HotswapError):
    """The model has no slot, and cannot be given one."""

    code = "not_prepared"

    def __init__(self, adapter_name: str, rule: str) -> None:
        super().__init__(adapter_name, rule)
        self.adapter_name = adapter_name
        self.rule = rule

    def __str__(self) -> str:
        return f"no slot named {self.adapter_name!r}: {self.rule}"


class AlreadyCompiled(HotswapError):
    """``prepare`` came after compile: compiled code would keep using the old tensors."""

    code = "already_compiled"

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module

    def __str__(self) -> str:
        return f"{self.module} is compiled already: prepare the model before compiling it"


class AdapterMerged(HotswapError):
    """The adapter is merged into the base weights, which a commit does not change."""

    code = "adapter_merged"

    def __init__(self, adapter_name: str) -> None:
        super().__init__(adapter_name)
        self.adapter_name = adapter_name

    def __str__(self) -> str:
        return f"adapter {self.adapter_name!r} is merged into the base model: unmerge it first"


class VerifyFailed(HotswapError):
    """The slot's bytes are not those of the live revision; names the first wrong tensor."""

    code = "verify_failed"

    def __init__(self, revision: str, tensor: str, rule: str) -> None:
        super().__init__(revision, tensor, rule)
        self.revision = revision
        self.tensor = tensor
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.revision} is live, tensor {self.tensor!r}: {self.rule}"


class SlotTensorMoved(VerifyFailed):
    """The model no longer reads a slot tensor: it was moved, cast, replaced or deleted."""

    code = "slot_tensor_moved"


class RecompiledAfterWarmup(HotswapError):
    """Graphs were compiled, or a recompile limit was hit, after warm-up was over."""

    code = "recompiled_after_warmup"

    def __init__(self, recompiles: int, limit_hits: int) -> None:
        super().__init__(recompiles, limit_hits)
        self.recompiles = recompiles
        self.limit_hits = limit_hits

    def __str__(self) -> str:
        return (
            f"{self.recompiles} graphs were compiled and {self.limit_hits} recompile limits were "
            "hit after warm-up"
        )
