"""The configuration of ``upcycle_moe``: a stock one, and which of its FFNs are experts.

``config.json`` is the dense model's, with ``model_type`` ``upcycle_moe``, ``base_model_type`` (the dense model's own type) and
``replaced_ffns``. What is read from it is an instance of the dense model's configuration class, too: stock code asks for nothing
else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from upcycle.errors import CheckpointError
from upcycle.models.own.adapted_ffn import AdaptedFfn, adapted_ffns_in
from upcycle.models.own.replaced_ffn import ReplacedFfn, replaced_in
from upcycle.models.own.slot_ffn import SlotFfn, slot_ffns_in

MODEL_TYPE = "upcycle_moe"
_PREFIX = "UpcycleMoe"


class UpcycleMoeConfig:
    """What the configuration classes of all bases have in common; ``AutoConfig`` reads a ``config.json`` by :meth:`from_dict`.

    Attributes:
        base_model_type: the ``model_type`` of the dense model.
        replaced_ffns: entries as :class:`~upcycle.models.own.replaced_ffn.ReplacedFfn` describes them.
        slot_ffns: entries as :class:`~upcycle.models.own.slot_ffn.SlotFfn` describes them.
        adapted_ffns: entries as :class:`~upcycle.models.own.adapted_ffn.AdaptedFfn` describes them.
        routing: parameters of routing rules to take instead of the stored ones: by name, for all FFNs that have such a
            parameter, or by the path of an FFN for it alone, as in ``from_pretrained(..., routing={"top_k": 1, "h.3.mlp": {"top_k":
            2}})``.
    """

    model_type = MODEL_TYPE
    base_model_type: str | None = None
    replaced_ffns: list[dict[str, Any]] = []
    slot_ffns: list[dict[str, Any]] = []
    adapted_ffns: list[dict[str, Any]] = []
    routing: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse to be made without a base.

        Raises:
            CheckpointError: always, for this class itself.
        """
        if cls is UpcycleMoeConfig:
            raise CheckpointError(
                f"a configuration of {MODEL_TYPE} is one of its base model",
                hint="upcycle.models.own.configuration.wrapped_config(BASE_CONFIG, REPLACED_FFNS)",
            )
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that a ``config.json`` describes, of a class of its base.

        Raises:
            CheckpointError: the base is unknown, or a key that says what is replaced is wrong.
        """
        base = config_dict.get("base_model_type")
        wanted = wrapped_config_class(base)
        # The other bases of `wanted` are a stock configuration class, whose method this is.
        made: Any = super(UpcycleMoeConfig, wanted).from_dict(dict(config_dict), **kwargs)  # type: ignore[misc]
        config = made[0] if isinstance(made, tuple) else made
        config.model_type, config.base_model_type = MODEL_TYPE, base
        replaced_in(config)
        slot_ffns_in(config)
        adapted_ffns_in(config)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for key in ("routing", "slot_ffns", "adapted_ffns"):
            if not found.get(key):
                found.pop(key, None)
        return {**found, "model_type": MODEL_TYPE, "base_model_type": self.base_model_type}


def wrapped_config_class(base: object) -> Any:
    """Return the class ``UpcycleMoe<Base>Config`` of a base, by its ``model_type``; it is registered when it is first made.

    Raises:
        CheckpointError: transformers has no such model.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(base, str) or base == MODEL_TYPE or base not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: 'base_model_type' is {base!r}, and transformers has no such model",
            hint="it must be the 'model_type' of the dense model; a newer transformers may know it",
        )
    return _made_class(base)


@cache
def _made_class(base: str) -> Any:
    from transformers import CONFIG_MAPPING

    from upcycle.models.own.auto_classes import register_models

    stock: Any = CONFIG_MAPPING[base]
    name = f"{_PREFIX}{stock.__name__}"
    own = {
        "__module__": __name__,
        "model_type": MODEL_TYPE,
        "base_model_type": base,
        "__doc__": UpcycleMoeConfig.__doc__,
    }
    made = type(stock)(name, (UpcycleMoeConfig, stock), own)
    setattr(sys.modules[__name__], name, made)  # where pickle finds it
    register_models(made, stock)
    return made


def __getattr__(name: str) -> Any:
    """Make the class of a base that another process pickled a configuration of."""
    from transformers import CONFIG_MAPPING

    wanted = name.removeprefix(_PREFIX)
    bases = [base for base, stock in CONFIG_MAPPING._mapping.items() if stock == wanted and wanted != name]
    if bases:
        return _made_class(bases[0])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def wrapped_config(
    base: Any,
    replaced: list[ReplacedFfn],
    slots: list[SlotFfn] | None = None,
    adapted: list[AdaptedFfn] | None = None,
) -> Any:
    """Return the configuration of a model whose FFNs are experts.

    Args:
        base: a stock configuration, or the content of a ``config.json``.
        replaced: its FFNs.
        slots: those whose experts read slots.
        adapted: those that stay, with experts of low rank beside them.

    Raises:
        CheckpointError: the base is unknown, or ``replaced``, ``slots`` and ``adapted`` contradict themselves.
    """
    raw = dict(base) if isinstance(base, Mapping) else base.to_dict()
    return UpcycleMoeConfig.from_dict(
        {
            **wrapped_json(raw, replaced),
            "slot_ffns": [ffn.to_json() for ffn in slots or ()],
            "adapted_ffns": [ffn.to_json() for ffn in adapted or ()],
        }
    )


def wrapped_json(raw: Mapping[str, Any], replaced: list[ReplacedFfn]) -> dict[str, Any]:
    """Return the ``config.json`` of a model whose FFNs are experts, from the dense model's."""
    entries = [ffn.to_json() for ffn in replaced]
    return {**raw, "model_type": MODEL_TYPE, "base_model_type": raw["model_type"], "replaced_ffns": entries}
