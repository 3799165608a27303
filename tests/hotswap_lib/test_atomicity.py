"""A fault anywhere in a swap leaves the old adapter or the new one, and never a mix of both.

Anywhere means: at every operation of torch's, with half of a copy done, and at every call, line
and return of the library's own code. No list of places is kept here that could become incomplete:
each test counts up until a swap comes through without its fault.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest
import torch
from peft.helpers import DoraCaching
from torch.utils._python_dispatch import TorchDispatchMode

import hotswap_lib
from hotswap_lib import (
    BASE,
    Envelope,
    Slot,
    SlotTensorMoved,
    Staged,
    VerifyFailed,
    hotswap_adapter,
    null_image,
    pack,
    preparation,
    prepare,
)
from hotswap_lib.layer_kinds import LORA_BIAS
from hotswap_lib.layout import BIAS, MAGNITUDE, SAVED, SCALING, Layout, Place, lay_out
from hotswap_lib.slot_tensors import SlotTensor, slot_tensors

from .families import FAMILIES, Family, assert_near

LIBRARY = str(Path(hotswap_lib.__file__).parent)


class Fault(Exception):
    """An error of torch, as if a device had failed."""


class OperationFault(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at the n-th torch operation; a copy has written the first half of its bytes by then."""

    def __init__(self, n: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = n

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        self.left -= 1
        if self.left == 0:
            if func is torch.ops.aten.copy_.default and args[0].ndim and len(args[0]) > 1:
                half = len(args[0]) // 2
                args[0][:half].copy_(args[1][:half])
            raise Fault
        return func(*args, **(kwargs or {}))


class Interrupt:
    """Interrupts the library's own code at its n-th call, line or return.

    Two kinds of events are left out, since no signal does harm there. Where a `with` statement is
    left, Python looks for signals after the last call inside it, and again when the lock is free,
    while its tracer stops in between. And a generator is called once more when it is thrown away,
    but what is raised then is raised nowhere.
    """

    def __init__(self, n: int) -> None:
        self.left = n
        self._entered: set[tuple[FrameType, int]] = set()

    def __enter__(self) -> Self:
        self._before = sys.gettrace()  # a debugger's, or that of a coverage run
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(LIBRARY):
            return None
        if event != "line" and code.co_flags & inspect.CO_GENERATOR:
            return self._trace
        if event == "line" and frame.f_lineno in lines_with_with(code.co_filename):
            if (frame, frame.f_lineno) in self._entered:
                return self._trace
            self._entered.add((frame, frame.f_lineno))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self._trace


@functools.cache
def lines_with_with(file: str) -> set[int]:
    lines = enumerate(Path(file).read_text().splitlines(), start=1)
    return {number for number, line in lines if line.lstrip().startswith("with ")}


FaultAt = type[OperationFault] | type[Interrupt]
anywhere = pytest.mark.parametrize("fault", [OperationFault, Interrupt])
# Interrupts at every line of long functions are slow; else at each seventh.
sampled = pytest.mark.parametrize(
    ("fault", "stride"),
    [(OperationFault, 1), (Interrupt, 7), pytest.param(Interrupt, 1, marks=pytest.mark.slow)],
)
both_ways = pytest.mark.parametrize(("old", "new"), [("full", "plain"), ("plain", "full")])


def each_fault(
    fault: FaultAt, *, before: Callable[[], object], do: Callable[[], object], stride: int = 1
) -> Iterator[int]:
    """Do it with one fault after the other; ends when nothing was left to fail."""
    for n in itertools.count(1, stride):
        before()
        with contextlib.suppress(Fault, KeyboardInterrupt), fault(n) as one:
            do()
        if one.left > 0:
            return
        yield n


# Two blocks, two dtypes, and everything that rests at other values than zero.
BERT = FAMILIES["bert"]
DORA = Envelope(
    max_rank=2,
    target_modules=["query", "word_embeddings"],
    modules_to_save=["classifier"],
    use_dora=True,
    bias="lora_only",
)
LORA_BIASES = Envelope(max_rank=2, target_modules=["query"], lora_bias=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query", "word_embeddings"],
        "modules_to_save": ["classifier"],
        "use_dora": True,
        "bias": "lora_only",
    },
    "plain": {"r": 1, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*1.*query"},
}


def on_two_devices(places: Iterable[Place], envelope: Envelope, **more: Any) -> Layout:
    """Half of the places go to cpu:0, which is another device by name and the same memory."""
    there = ("layer.1", "classifier")
    moved = [
        replace(place, device="cpu:0") if any(part in place.module for part in there) else place
        for place in places
    ]
    return lay_out(moved, envelope, **more)


def two_block_slot(envelope: Envelope) -> Slot:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "lay_out", on_two_devices)
        return prepare(BERT.base().to(torch.bfloat16), envelope=envelope)


State = tuple[Any, ...]


def state(slot: Slot) -> State:
    """All that a swap changes, and the revision.

    That the slot's tensors are those that the model computes with is for `Slot.verify` to say.
    """
    contents = torch.cat([bytes_of(tensor) for tensor in slot.tensors.values()])
    config = copy.deepcopy(vars(slot.model.peft_config["default"]))
    return slot.revision, contents.numpy().tobytes(), config


def bytes_of(tensor: Any) -> torch.Tensor:
    """The tensor's own memory as uint8."""
    raw: torch.Tensor = tensor.data.reshape(-1).view(torch.uint8)
    return raw


@dataclass(frozen=True)
class World:
    """A slot with three revisions to swap between, and what each of them is when it is whole."""

    slot: Slot
    paths: Mapping[str, Path]
    staged: Mapping[str, Staged]
    whole: Mapping[str, State]

    def go(self, *names: str) -> None:
        """Commit them one after the other, so that the last one is live."""
        for name in names:
            self.slot.commit(self.staged[name])

    def check(self, *allowed: str) -> str:
        """Prove that one of them is live and whole; returns which."""
        live = self.slot.revision.name
        assert live in allowed
        assert state(self.slot) == self.whole[live]
        # in another thread, because the lock that a swap holds lets its own thread through
        thread = threading.Thread(target=self.slot.verify, daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive(), "the slot is locked for ever"
        return live


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    slot = two_block_slot(DORA)
    assert [block.device for block in slot.layout.blocks] == ["cpu", "cpu:0"]
    kinds = {(entry.block, entry.dtype) for entry in slot.layout.entries}
    assert kinds == {(block, dtype) for block in (0, 1) for dtype in ("bfloat16", "float32")}
    folder = tmp_path_factory.mktemp("adapters")
    paths = {
        name: BERT.save(folder / name, seed=seed, **config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }
    images = {name: pack(path, slot.layout) for name, path in paths.items()}
    images[BASE.name] = null_image(slot.layout)
    staged = {name: slot.stage(image) for name, image in images.items()}
    whole = {}
    for name in staged:
        slot.commit(staged[name])
        slot.verify()
        whole[name] = state(slot)
    return World(slot=slot, paths=paths, staged=staged, whole=whole)


@anywhere
@both_ways
def test_a_fault_anywhere_in_a_commit_leaves_one_whole_adapter_and_the_way_back(
    world: World, fault: FaultAt, old: str, new: str
) -> None:
    def commit() -> None:
        world.go(new)

    outcomes, n = set(), 0
    for n in each_fault(fault, before=lambda: world.go("base", old), do=commit):  # noqa: B007
        live = world.check(old, new)
        outcomes.add(live)
        world.slot.rollback()
        world.check({old: "base", new: old}[live])
        commit()
        world.check(new)
    assert n >= (2 if fault is OperationFault else 100)
    # an interrupt on the very last line finds everything done
    assert outcomes == ({old} if fault is OperationFault else {old, new})


@anywhere
@both_ways
def test_a_fault_anywhere_in_a_rollback_leaves_one_whole_adapter_and_the_way_back(
    world: World, fault: FaultAt, old: str, new: str
) -> None:
    outcomes, n = set(), 0
    for n in each_fault(fault, before=lambda: world.go(new, old), do=world.slot.rollback):  # noqa: B007
        live = world.check(old, new)
        outcomes.add(live)
        world.slot.rollback()
        world.check({old: new, new: old}[live])
        world.slot.rollback()
        world.check(live)
    assert n >= (2 if fault is OperationFault else 100)
    assert outcomes == ({old} if fault is OperationFault else {old, new})


@sampled
@both_ways
def test_a_fault_anywhere_in_staging_leaves_the_live_adapter_alone(
    world: World, fault: FaultAt, stride: int, old: str, new: str
) -> None:
    image, n = pack(world.paths[new], world.slot.layout), 0
    packed = [block.tobytes() for block in image.blocks]

    def stage() -> Staged:
        return world.slot.stage(image)

    for n in each_fault(fault, before=lambda: world.go(old), do=stage, stride=stride):  # noqa: B007
        world.check(old)
        world.slot.commit(stage())
        world.check(new)
        assert [block.tobytes() for block in image.blocks] == packed
    # "full" brings a value for everything, and its bytes are staged where they are
    if fault is OperationFault:
        assert n >= {"full": 2, "plain": 50}[new]
    else:
        assert n >= {"full": 30, "plain": 200}[new]


@pytest.mark.parametrize(
    ("fault", "stride"),
    [(OperationFault, 1), (Interrupt, 47), pytest.param(Interrupt, 1, marks=pytest.mark.slow)],
)
def test_a_fault_anywhere_in_packing_leaves_the_live_adapter_alone(
    world: World, fault: FaultAt, stride: int
) -> None:
    def pack_it() -> Any:
        return pack(world.paths["plain"], world.slot.layout)

    n = 0
    for n in each_fault(fault, before=lambda: world.go("full"), do=pack_it, stride=stride):  # noqa: B007
        world.check("full")
        world.slot.commit(world.slot.stage(pack_it()))
        assert state(world.slot) == world.whole["plain"]
    assert n >= (50 if fault is OperationFault else 1000)


@sampled
def test_after_a_fault_the_model_computes_with_no_norm_that_peft_cached_for_another_adapter(
    world: World, fault: FaultAt, stride: int
) -> None:
    def start() -> None:
        world.go("full")
        BERT.outputs(world.slot.model)  # fills the caches

    want = {}
    for name in ("full", "plain"):
        world.go(name)
        want[name] = BERT.outputs(world.slot.model)
    assert not torch.equal(want["full"], want["plain"])
    with DoraCaching():
        swap = functools.partial(world.go, "plain")
        for _ in each_fault(fault, before=start, do=swap, stride=stride):
            output = BERT.outputs(world.slot.model)
            assert torch.equal(output, want[world.slot.revision.name])


def test_interrupting_puts_the_trace_function_of_others_back() -> None:
    before = sys.gettrace()
    with pytest.raises(KeyboardInterrupt), Interrupt(1):
        Envelope(max_rank=1)
    assert sys.gettrace() is before


@pytest.fixture(scope="module", params=["DoRA", "bias on lora_B"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Slot:
    """A slot that serves an adapter; every test leaves it as it was."""
    if request.param == "DoRA":
        slot, config = two_block_slot(DORA), CONFIGS["full"]
    else:
        slot, config = two_block_slot(LORA_BIASES), {"target_modules": ["query"], "lora_bias": True}
    path = BERT.save(tmp_path_factory.mktemp("live") / "live", seed=1, **{"r": 2, **config})
    hotswap_adapter(slot.model, path)
    return slot


def test_verify_names_every_tensor_by_any_one_of_its_bits(live: Slot) -> None:
    for site in slot_tensors(live.model, live.envelope, live.adapter_name):
        raw = bytes_of(held(site))
        for byte, bit in ((0, 0), (len(raw) // 2, 3), (-1, 7)):
            raw[byte] ^= 1 << bit
            with pytest.raises(VerifyFailed) as caught:
                live.verify()
            assert type(caught.value) is VerifyFailed
            assert caught.value.tensor == site.place.key
            raw[byte] ^= 1 << bit
    live.verify()


def test_the_slots_whose_bits_are_flipped_hold_every_kind_of_tensor(live: Slot) -> None:
    kinds = {entry.role for entry in live.layout.entries} - {"lora_A.weight", "lora_B.weight"}
    embedding = {"lora_embedding_A", "lora_embedding_B"}
    rests = {BIAS, SAVED, MAGNITUDE}
    assert kinds in ({SCALING, *embedding, *rests}, {SCALING, LORA_BIAS.suffix})


def held(site: SlotTensor) -> Any:
    """The object that the model holds there."""
    if isinstance(site.holder, dict | torch.nn.ParameterDict):
        return site.holder[site.name]
    return getattr(site.holder, site.name)


def bind(site: SlotTensor, value: Any) -> None:
    if isinstance(site.holder, dict):
        dict.__setitem__(site.holder, site.name, value)  # past what assigns into the slot
    elif isinstance(site.holder, torch.nn.ParameterDict):
        site.holder[site.name] = value
    else:
        setattr(site.holder, site.name, value)


def refused(slot: Slot) -> set[str]:
    """The tensors that both checks name."""
    named = set()
    for check in (slot.check_pinned, slot.verify):
        with pytest.raises(SlotTensorMoved) as caught:
            check()
        named.add(caught.value.tensor)
    return named


def test_verify_names_every_tensor_whose_memory_was_exchanged(live: Slot) -> None:
    for site in slot_tensors(live.model, live.envelope, live.adapter_name):
        tensor: Any = held(site)
        own = tensor.data
        tensor.data = own.clone()
        assert refused(live) == {site.place.key}
        tensor.data = own
    live.verify()


def test_verify_names_every_tensor_that_was_replaced_by_its_equal_or_by_a_number(
    live: Slot,
) -> None:
    for site in slot_tensors(live.model, live.envelope, live.adapter_name):
        own: Any = held(site)
        for other in [copy.deepcopy(own), *([float(own)] if site.place.role == SCALING else [])]:
            bind(site, other)
            assert refused(live) == {site.place.key}
        bind(site, own)
    live.verify()


def test_verify_names_a_tensor_of_every_module_that_was_replaced_whole(live: Slot) -> None:
    base = live.model.get_base_model()
    for module in {entry.module for entry in live.layout.entries}:
        parent, _, name = module.rpartition(".")
        own = base.get_submodule(module)
        inside = getattr(own, "base_layer", getattr(own, "original_module", None))
        assert inside is not None
        for other in (copy.deepcopy(own), inside):
            setattr(base.get_submodule(parent), name, other)
            (tensor,) = refused(live)
            assert tensor.startswith(f"base_model.model.{module}.")
        setattr(base.get_submodule(parent), name, own)
        containers = getattr(own, "modules_to_save", getattr(own, "lora_A", None))
        if containers:  # the adapter's own copy alone, inside its wrapper or layer
            held = containers["default"]
            containers["default"] = copy.deepcopy(held)
            (tensor,) = refused(live)
            assert tensor.startswith(f"base_model.model.{module}.")
            containers["default"] = held
    live.verify()


@dataclass(frozen=True)
class Case:
    """An adapter that has one feature, and an envelope that has place for it and for more."""

    family: Family
    envelope: Mapping[str, Any]
    adapter: Mapping[str, Any] | None  # None is the null image

    def slot(self) -> Slot:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return prepare(self.family.base(), envelope=Envelope(max_rank=8, **self.envelope))

    def filler(self) -> dict[str, Any]:
        """An adapter that uses all that the envelope offers."""
        return {"r": 8, "lora_alpha": 3, **self.envelope}


def case(name: str, envelope: dict[str, Any], **adapter: Any) -> Case:
    return Case(FAMILIES[name], envelope, adapter)


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ALL = {
    "target_modules": ["query", "value", "word_embeddings"],
    "modules_to_save": ["classifier"],
    "use_dora": True,
    "bias": "lora_only",
}
CONV = {"target_modules": ["line", "grouped", "space"]}
CASES = {
    "rank and alpha patterns": case(
        "llama",
        LLAMA,
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
        alpha_pattern={"q_proj": 5, r"^model\.layers\.0\.mlp\.down_proj": 64},
    ),
    "rsLoRA": case("llama", LLAMA, r=2, target_modules=r".*1.*q_proj", use_rslora=True),
    "DoRA": case("llama", {**LLAMA, "use_dora": True}, r=2, use_dora=True, **LLAMA),
    "DoRA on tied embeddings": case(
        "qwen2",
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        r=2,
        use_dora=True,
        target_modules=["embed_tokens", "q_proj"],
    ),
    "bias on lora_B": case("llama", {**LLAMA, "lora_bias": True}, r=3, lora_bias=True, **LLAMA),
    "biases of the targets": case(
        "bert", ALL, r=2, bias="lora_only", target_modules=["query", "value"]
    ),
    "all biases": case(
        "bert",
        {"target_modules": ["query"], "bias": "all"},
        r=2,
        bias="all",
        target_modules=["query"],
    ),
    "saved modules": case(
        "bert", ALL, r=2, target_modules=["value"], modules_to_save=["classifier"]
    ),
    "saved modules with buffers": case(
        "convnet",
        {**CONV, "modules_to_save": ["head", "norm"]},
        r=4,
        target_modules=["line"],
        modules_to_save=["norm"],
    ),
    "embeddings": case("bert", ALL, r=3, target_modules=["word_embeddings"]),
    "embeddings tied to the head": case(
        "gpt2", {"target_modules": ["c_attn", "wte"]}, r=2, target_modules=["wte", "c_attn"]
    ),
    "grouped convolution": case("convnet", CONV, r=4, target_modules=["grouped", "line"]),
    "everything": case("bert", ALL, r=5, lora_alpha=7, **ALL),
    "fewer features than the envelope": case("bert", ALL, r=1, target_modules=["query"]),
    "null in a plain envelope": Case(FAMILIES["llama"], LLAMA, None),
    "null in a full envelope": Case(FAMILIES["bert"], ALL, None),
    "null over a grouped convolution": Case(FAMILIES["convnet"], CONV, None),
}
SHOWN = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("bias", "modules_to_save", "target_modules"),
)


@pytest.mark.parametrize("feature", [name for name in CASES if CASES[name].adapter is not None])
def test_after_a_commit_peft_config_tells_the_truth(tmp_path: Path, feature: str) -> None:
    family, adapter = CASES[feature].family, CASES[feature].adapter
    assert adapter is not None
    slot = CASES[feature].slot()
    config, null = slot.model.peft_config["default"], state(slot)[2]
    paths = [
        family.save(tmp_path / "filler", seed=1, **CASES[feature].filler()),
        family.save(tmp_path / "adapter", seed=2, **adapter),
    ]
    for path in (*paths, *paths):
        hotswap_adapter(slot.model, path)
        fresh = family.fresh(path).peft_config["default"]
        assert slot.model.peft_config["default"] is config
        shown = {field: getattr(config, field) for field in SHOWN}
        assert shown == {field: getattr(fresh, field) for field in SHOWN}
    slot.commit(slot.stage(null_image(slot.layout)))
    assert state(slot)[2] == null


@pytest.mark.parametrize("feature", CASES)
def test_the_live_adapter_saves_and_loads_back_as_what_it_is(tmp_path: Path, feature: str) -> None:
    family, adapter = CASES[feature].family, CASES[feature].adapter
    slot = CASES[feature].slot()
    # first one that leaves something everywhere
    filler = family.save(tmp_path / "filler", seed=1, **CASES[feature].filler())
    hotswap_adapter(slot.model, filler)
    if adapter is None:
        slot.commit(slot.stage(null_image(slot.layout)))
        original = family.outputs(family.base())
    else:
        path = family.save(tmp_path / "adapter", seed=2, **adapter)
        hotswap_adapter(slot.model, path)
        original = family.outputs(family.fresh(path))
    live = state(slot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's word on the embeddings that it saves as well
        slot.model.save_pretrained(str(tmp_path / "saved"))
    assert state(slot) == live
    assert torch.equal(family.outputs(family.fresh(tmp_path / "saved")), original)
    assert_near(family.outputs(slot.model), original)
    if adapter is not None:  # the null image's scalings have a test of their own
        hotswap_adapter(slot.model, filler)
        assert state(slot)[1] != live[1]
        hotswap_adapter(slot.model, tmp_path / "saved")
        assert state(slot)[1] == live[1]


@pytest.mark.parametrize("feature", [name for name in CASES if CASES[name].adapter is None])
def test_the_null_image_saves_and_packs_back_to_its_own_bytes(tmp_path: Path, feature: str) -> None:
    slot = CASES[feature].slot()
    live = state(slot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's word on the embeddings that it saves as well
        slot.model.save_pretrained(str(tmp_path))
    hotswap_adapter(slot.model, tmp_path)
    assert state(slot)[1] == live[1]
