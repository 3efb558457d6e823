"""Which targets AutoEP can divide, and the wrapper around what DeepSpeed and transformers disagree about."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from upcycle.errors import UsageError
from upcycle.registry import TARGETS
from upcycle.trainers.distributed import expert_parallel

pytest.importorskip("deepspeed")


def test_presets_are_deepspeeds() -> None:
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

    for model_type, preset in expert_parallel.AUTOEP_PRESETS.items():
        assert model_type in PRESET_MODELS[preset].hf_model_types
        assert model_type in TARGETS


def test_what_deepspeed_has_presets_for_is_offered_or_refused_with_a_reason() -> None:
    from deepspeed.module_inject.auto_ep_presets.registry import preset_name_for_hf_model_type

    for model_type in TARGETS:
        if preset_name_for_hf_model_type(model_type):
            assert model_type in expert_parallel.AUTOEP_PRESETS or model_type in expert_parallel._REFUSED


@pytest.mark.parametrize(
    ("model_type", "experts", "size", "world", "message"),
    [
        ("glm4_moe", 4, 2, 2, "biases on the choice of experts"),
        ("granitemoe", 4, 2, 2, "no preset for this architecture"),
        ("llama", 0, 2, 2, "no preset for this architecture"),
        ("mixtral", 3, 2, 2, "does not divide 3 experts"),
        ("mixtral", 6, 3, 4, "does not divide 4 ranks"),
    ],
)
def test_divisions_that_deepspeed_cannot_run_are_refused(
    model_type: str, experts: int, size: int, world: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        expert_parallel.check(model_type, experts, size, world)


def test_the_wrapper_answers_as_deepspeed_asks_and_is_taken_off_again() -> None:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    own = type(_CAN_RECORD_REGISTRY).get
    with expert_parallel.compatible_registry():
        assert _CAN_RECORD_REGISTRY.get("no such class", "default") == "default"
        for name in list(_CAN_RECORD_REGISTRY)[:3]:
            assert _CAN_RECORD_REGISTRY.get(name, None) == dict(_CAN_RECORD_REGISTRY)[name]
    assert type(_CAN_RECORD_REGISTRY).get is own


def test_the_wrapper_is_needed_with_these_versions_only() -> None:
    """Fails when transformers or DeepSpeed have come to terms: then ``compatible_registry`` can go."""
    with expert_parallel.compatible_registry() as needed:
        pass
    assert needed == (Version(transformers.__version__) >= Version("5.23"))
