"""Each private or undocumented part of PEFT that the library uses still works as expected."""

from __future__ import annotations

from typing import Any, cast

import peft.tuners.lora as lora
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from hotswap_lib import peft_internals
from hotswap_lib.layer_kinds import KINDS


class Net(torch.nn.Module):
    """A layer of each kind that PEFT has without other libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.embedding = torch.nn.Embedding(4, 4)
        self.conv1 = torch.nn.Conv1d(4, 4, 1)
        self.conv2 = torch.nn.Conv2d(4, 4, 1)
        self.conv3 = torch.nn.Conv3d(4, 4, 1)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.linear(x))
        return output


ALL = ["linear", "embedding", "conv1", "conv2", "conv3"]


def make(**config: Any) -> PeftModel:
    fields = {"r": 2, "target_modules": ["linear"], **config}
    return get_peft_model(Net(), LoraConfig(**fields)).eval()


def layer(model: PeftModel, name: str = "linear") -> LoraLayer:
    found = model.get_base_model().get_submodule(name)
    assert isinstance(found, LoraLayer)
    return found


def test_patterns_are_matched_as_pefts_layers_are_made() -> None:
    pattern = {r"line.*": 4, "head": 1}
    model = make(target_modules=["linear", "head", "conv1"], rank_pattern=pattern)
    for name in ("linear", "head", "conv1"):
        assert layer(model, name).r["default"] == peft_internals.in_pattern(pattern, name, 2), (
            "PEFT no longer matches rank_pattern with get_pattern_key: see in_pattern"
        )
    assert peft_internals.in_pattern({}, "linear", 2) == 2


def test_targets_are_those_on_which_peft_puts_lora() -> None:
    config = LoraConfig(r=2, target_modules=["linear", "head"], exclude_modules=["head"])
    model = get_peft_model(Net(), config)
    for name, module in model.get_base_model().named_modules():
        if "." not in name and name:
            assert isinstance(module, LoraLayer) == peft_internals.is_target(config, name), (
                "PEFT no longer chooses targets with check_target_module_exists: see is_target"
            )


def test_a_published_configuration_is_the_same_object_with_other_fields() -> None:
    model = make()
    config = model.peft_config["default"]
    peft_internals.publish_config(model, "default", {"r": 7, "use_rslora": True})
    assert model.peft_config["default"] is config
    assert (config.r, config.use_rslora) == (7, True), (
        "LoraConfig no longer keeps its fields in its __dict__: see publish_config"
    )


def test_an_adapter_is_injected_again_into_the_same_model() -> None:
    model = make()
    model.add_adapter("other", LoraConfig(r=1, target_modules=["linear"]))
    for _, container in list(peft_internals.containers(layer(model), "default")):
        del container["default"]
    config = LoraConfig(r=3, target_modules=["linear", "head"])
    peft_internals.inject_again(model, config, "default")
    message = "PEFT's tuner no longer has inject_adapter as it was: see inject_again"
    assert model.peft_config["default"] is config, message
    assert layer(model).lora_A["default"].weight.shape == (3, 4), message
    assert layer(model).lora_A["default"].weight.is_meta, message
    assert layer(model).lora_A["other"].weight.shape == (1, 4), message
    assert peft_internals.holds(layer(model, "head"), "default"), message
    assert model.active_adapters == ["default"], message


def test_the_configuration_that_get_peft_model_leaves_is_removed() -> None:
    base = Net()
    get_peft_model(base, LoraConfig(r=2, target_modules=["linear"]))
    assert hasattr(base, "peft_config"), (
        "PEFT no longer stores peft_config on the base model: restore_config may go"
    )
    peft_internals.restore_config(base, "default", None)
    assert not hasattr(base, "peft_config")


def test_the_kinds_of_layers_are_pefts_classes_by_name() -> None:
    model = make(target_modules=ALL)
    found = {peft_internals.layer_kind(layer(model, name)) for name in ALL}
    built_in = {kind for kind in KINDS if kind.startswith("layer.")}
    assert found == built_in, "PEFT moved or renamed a LoRA layer class: see layer_kinds.KINDS"


def test_the_classes_over_quantized_layers_are_where_the_table_says() -> None:
    from importlib.util import find_spec

    for kind in KINDS:
        module = f"{lora.__name__}.{kind.split('.')[0]}"
        assert find_spec(module) is not None, f"PEFT no longer has {module}: see layer_kinds.KINDS"


def test_a_layer_tells_which_adapters_it_holds_and_scales_by_its_dict() -> None:
    model, x = make(lora_alpha=8, init_lora_weights=False), torch.ones(1, 4)
    one = layer(model)
    assert peft_internals.holds(one, "default")
    assert not peft_internals.holds(one, "other")
    with_lora = model(x)
    peft_internals.replace_scalings(one, {"default": 0.0})
    message = "PEFT's layers no longer multiply by layer.scaling[adapter]: see scalings"
    assert peft_internals.scalings(one) == {"default": 0.0}, message
    assert not torch.equal(model(x), with_lora), message
    peft_internals.replace_scalings(one, {"default": torch.tensor(4.0)})
    torch.testing.assert_close(model(x), with_lora, msg=message)


def test_scalings_are_recomputed_from_the_alpha() -> None:
    one = layer(make(lora_alpha=8))
    peft_internals.set_alpha(one, "default", 6)
    one.set_scale("default", 1.0)
    assert peft_internals.scalings(one)["default"] == 3.0, (
        "PEFT's set_scale no longer reads layer.lora_alpha: see set_alpha"
    )


def test_a_merged_adapter_is_recognised() -> None:
    model = make()
    assert not peft_internals.is_merged(layer(model), "default")
    model.merge_adapter()
    assert peft_internals.is_merged(layer(model), "default"), (
        "PEFT no longer lists merged adapters in layer.merged_adapters: see is_merged"
    )
    assert not peft_internals.is_merged(layer(model), "other")


@pytest.mark.parametrize("name", ALL)
def test_everything_that_a_layer_keeps_for_an_adapter_is_found(name: str) -> None:
    one = layer(make(target_modules=[name], use_dora=True), name)
    kept = {
        attribute
        for attribute, value in {**vars(one), **one._modules}.items()
        if isinstance(value, dict | torch.nn.ModuleDict | torch.nn.ParameterDict)
        and "default" in value
    }
    found = {attribute for attribute, _ in peft_internals.containers(one, "default")}
    assert kept <= found, (
        f"PEFT's layers keep {kept - found} for each adapter, which containers does not list"
    )
    of_adapters = {id(p) for m in peft_internals.adapter_modules(one) for p in m.parameters()}
    of_the_base = {id(p) for p in one.get_base_layer().parameters()}
    assert of_adapters == {id(p) for p in one.parameters()} - of_the_base, (
        "PEFT's adapter_layer_names no longer lists all weights of adapters: see adapter_modules"
    )


def test_the_magnitude_of_dora_is_the_norm_that_peft_divides_by() -> None:
    model = make(use_dora=True, init_lora_weights=False)
    one = layer(model)
    magnitude = peft_internals.magnitude_module(one, "default")
    message = "PEFT's DoRA layers changed: see magnitude_module and weight_norm"
    assert magnitude is not None, message
    assert peft_internals.magnitude_module(layer(make()), "default") is None, message
    norm = peft_internals.weight_norm(
        magnitude,
        weight=peft_internals.dequantized_weight(one.get_base_layer()),
        lora_A=one.lora_A["default"],
        lora_B=one.lora_B["default"],
        scaling=torch.tensor(peft_internals.scalings(one)["default"]),
    )
    magnitude.weight.data.copy_(norm)
    plain = one.get_base_layer().weight + one.get_delta_weight("default")
    x = torch.eye(4)
    expected = x @ plain.T + one.get_base_layer().bias
    torch.testing.assert_close(one(x), expected, rtol=1e-5, atol=1e-5, msg=message)


def test_cached_norms_are_dropped() -> None:
    model, x = make(use_dora=True, init_lora_weights=False), torch.ones(1, 4)
    with torch.no_grad(), DoraCaching():
        before = model(x)
        layer(model).lora_B["default"].weight.mul_(3)
        stale = model(x)
        peft_internals.clear_norm_cache(layer(model), "default")
        fresh = model(x)
    assert not torch.equal(before, stale)
    assert not torch.equal(stale, fresh), (
        "PEFT no longer caches DoRA's norms in _dora_cache: see clear_norm_cache"
    )


def test_a_saved_module_has_a_copy_for_each_adapter() -> None:
    model = make(modules_to_save=["head"])
    wrapper = model.get_base_model().get_submodule("head")
    message = "PEFT's ModulesToSaveWrapper changed: see hotswap_lib/peft_internals.py"
    assert isinstance(wrapper, ModulesToSaveWrapper), message
    assert peft_internals.has_copy(wrapper, "default"), message
    original = peft_internals.original_of(wrapper)
    copy = peft_internals.copy_of(wrapper, "default")
    assert isinstance(copy, torch.nn.Linear), message
    assert copy is not original, message
    assert torch.equal(copy.weight, cast(torch.Tensor, original.weight)), message
    peft_internals.delete_copy(wrapper, "default")
    assert not peft_internals.has_copy(wrapper, "default"), message
