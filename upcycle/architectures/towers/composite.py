"""A model of parts as a dense family: its text model's family, whose names get a prefix, and the tensors of the other parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.architectures.dense_config import DenseConfig
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.refused import reason
from upcycle.architectures.stock import build_config, empty_model
from upcycle.architectures.stock_classes import names_in_stock
from upcycle.architectures.tensor_origin import Origin
from upcycle.architectures.towers.wrapper import Wrapper
from upcycle.errors import RefusalError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.formats.settings import model_type
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.registry import DESCRIBED, FAMILIES, WRAPPERS, load

TEXT = "text_config"
_OF_THE_FILE = {TEXT, "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CompositeConfig(DenseConfig):
    """The text model's configuration, with that of the parts around it.

    Attributes:
        parts: the keys of ``config.json`` outside the text model.
        towers: shapes of the tensors outside text model and head, by their names in the stock class.
        scaled_table: whether the table of embeddings multiplies what is looked up, and not the text model all that it reads.
        spelling: the names of tensors in the source's files, by their names in the stock class; empty where no file was opened.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)
    towers: Shapes = field(default_factory=dict)
    scaled_table: bool = False
    spelling: Mapping[str, str] = field(default_factory=dict, compare=False)


class CompositeFamily(Family):
    """Describes the dense model of parts that a wrapper makes around a text model of a known family.

    Tensors are called by their names in the stock class. Files have older names in places (``language_model.model.layers`` for
    ``model.language_model.layers``): :meth:`stock_names` says which.

    Args:
        wrapper: the model of parts.
        inner: the family of its text model.
    """

    def __init__(self, wrapper: Wrapper, inner: Family) -> None:
        self.wrapper, self.inner = wrapper, inner
        self.name, self.title = wrapper.name, f"{wrapper.title} ({inner.title})"
        self.targets, self.elsewhere, self.aliases = inner.targets, inner.elsewhere, inner.aliases
        self.module_paths = inner.module_paths.inside(wrapper.body)
        self.unheld = inner.unheld
        self.uncalibrated, self.pauses, self.remark = inner.uncalibrated, inner.pauses, wrapper.remark
        self.embeds_tokens_alone, self.returns_tuple = inner.embeds_tokens_alone, inner.returns_tuple

    def _outer(self, name: str) -> str:
        return self.inner.module_paths.renamed(name, self.module_paths)

    def _inner(self, name: str) -> str:
        return self.module_paths.renamed(name, self.inner.module_paths)

    def outer(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return shapes by the names that the text model's tensors have inside the wrapper."""
        return {self._outer(name): shape for name, shape in shapes.items()}

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> CompositeConfig:
        """Read ``config.json``: the text model's keys as its family does, with the defaults that the stock class gives them.

        Whether the head is tied is up to the model of parts, and nothing scales its logits.

        Raises:
            RefusalError: the configuration needs something that no target can hold.
            CheckpointError: a value is invalid.
        """
        stock = build_config(raw, where)
        model = empty_model(stock, where)
        tied = bool(getattr(stock, "tie_word_embeddings", False))
        text = self.inner.config(_as_json(stock.text_config) | {"tie_word_embeddings": tied}, f"{where}: {TEXT}")
        flat: set[str] = set()  # older files keep the text model's keys outside
        if TEXT not in raw:
            flat = {"rope_scaling", "rope_theta", *stock.text_config.to_dict()} - {each.name for each in fields(stock)}
        others = {key: value for key, value in raw.items() if key not in _OF_THE_FILE and key not in flat}
        values = {each.name: getattr(text, each.name) for each in fields(DenseConfig)}
        changed = {
            "family": self.name,
            "dtype": raw.get("dtype") or raw.get("torch_dtype") or text.dtype,
            "tie_word_embeddings": tied,
            "logits_multiplier": 1.0,
            "logits_cap": None,
            "raw": raw,
        }
        return CompositeConfig(
            **values | changed,
            parts=others | {"tie_word_embeddings": tied},
            towers={n: tuple(t.shape) for n, t in model.state_dict().items() if not self.module_paths.has(n)},
            scaled_table=hasattr(model.get_submodule(self.module_paths.embedding), "embed_scale"),
        )

    def stock_names(self, raw: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
        """Return the stored names by their names in the stock class, without those of tensors that this class leaves out."""
        return names_in_stock(empty_model(raw, self.name), stored)

    def spelt(self, config: DenseConfig, names: Mapping[str, str]) -> CompositeConfig:
        """Return the configuration with the names that tensors have in the source's files, by their names in the stock class."""
        assert isinstance(config, CompositeConfig)
        return replace(config, spelling=names)

    def written(self, config: DenseConfig, name: str) -> str:
        """Return the name that the source's files have, or would have, for a tensor."""
        return written_name(self.module_paths, config, name)

    def rewritten(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a ``config.json`` as a start for another model of this family, as the base class does."""
        text = _as_json(build_config(raw, self.name).text_config) | dict(raw.get(TEXT) or {})
        return {key: value for key, value in raw.items() if key != "auto_map"} | {TEXT: text}

    def narrowed(self, raw: Mapping[str, Any], width: int) -> dict[str, Any]:
        """Return the ``config.json`` of the same model with FFNs of ``width`` neurons in its text model."""
        config = self.rewritten(raw)
        return {**config, TEXT: self.inner.narrowed(config[TEXT], width)}

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return the names of one FFN of the text model."""
        return {part: self._outer(name) for part, name in self.inner.ffn_names(layer).items()}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of one decoder layer's tensors outside the FFN."""
        return self.outer(self.inner.layer_specs(config, layer))

    def ffn_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the matrices and biases of one dense FFN."""
        return self.outer(self.inner.ffn_specs(config, layer))

    def first_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of the embeddings."""
        return self.outer(self.inner.first_specs(config))

    def last_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the final norm, and of the head unless it is tied."""
        return self.outer(self.inner.last_specs(config))

    def stored_specs(self, config: DenseConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the text model's tensors of one layer, or (None) outside the layers."""
        return self.outer(self.inner.stored_specs(config, layer))

    def tower_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors outside text model and head."""
        assert isinstance(config, CompositeConfig)
        return dict(config.towers)

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return where the tensor that targets call ``name`` comes from."""
        assert isinstance(config, CompositeConfig)
        if name in config.towers:
            return Origin(name)
        origin = self.inner.origin(config, self._inner(name))
        return replace(origin, name=self._outer(origin.name))

    def ffn_origins(self, config: DenseConfig, layer: int) -> dict[str, Origin]:
        """Return where the tensors of :meth:`ffn_names`, and the biases, come from."""
        origins = self.inner.ffn_origins(config, layer)
        return {part: replace(origin, name=self._outer(origin.name)) for part, origin in origins.items()}

    def ffn_dtype(self, config: DenseConfig, specs: Mapping[str, TensorSpec], layer: int, dtype: str = "keep") -> str:
        """Return the dtype of a layer's experts, as the text model's family does."""
        return self.inner.ffn_dtype(config, {self._inner(name): spec for name, spec in specs.items()}, layer, dtype)

    def replaced_modules(self, layer: int) -> tuple[str, ...]:
        """Return the modules of the text model, below the base model, that go where experts take the place of a layer's FFN."""
        body = self.wrapper.body.partition(".")[2]
        return tuple(f"{body}.{path}" for path in self.inner.replaced_modules(layer))

    def ffn_dropout(self, layer: int) -> float:
        """Return the probability of a dropout at their end."""
        return self.inner.ffn_dropout(layer)

    def check_known_whole(self, method: str) -> None:
        """Refuse a method that needs to know more of the text model than its FFNs, where these are all that is described."""
        self.inner.check_known_whole(method)

    def norms_below(self, layer: int) -> list[str]:
        """Return the names of the norms of all outputs added to the stream below an FFN that reads it without a norm."""
        return [self._outer(name) for name in self.inner.norms_below(layer)]


def written_name(paths: ModulePaths, config: DenseConfig, name: str) -> str:
    """Return the name under which a tensor of a model of parts is written: that of the source's files.

    A tensor that the source does not have gets the prefix of those that it has.

    Args:
        paths: of the model that is written.
        config: the source's configuration.
        name: the tensor's name in the stock class.
    """
    assert isinstance(config, CompositeConfig)
    spelling = config.spelling
    if name in spelling or not spelling:
        return spelling.get(name, name)
    stock, stored = next(pair for pair in spelling.items() if pair[0].startswith(f"{paths.layers}."))
    prefix = stored.removesuffix(stock.removeprefix(paths.body))
    if name.startswith(f"{paths.body}."):
        return prefix + name.removeprefix(paths.body)
    around, _, last = prefix.rpartition(".")
    return f"{around}.{name}" if last == ModulePaths().body and around else name  # the head, which was tied


def _as_json(config: Any) -> dict[str, Any]:
    """Return a stock configuration as its file would hold it, with every value written out."""
    content: dict[str, Any] = parse_json(config.to_json_string(use_diff=False), "config.json")
    return content


def composite_family(raw: Mapping[str, Any], where: str) -> CompositeFamily:
    """Return the family of a model of parts, whose ``model_type`` is that of a wrapper.

    Raises:
        RefusalError: its text model is of no known family, or it is a MoE already.
        CheckpointError: the stock class refuses the configuration.
    """
    name = model_type(raw, where)
    wrapper: Wrapper = load("wrapper", name)
    if name == wrapper.moe:
        raise RefusalError(
            f"cannot convert a '{name}' model: {reason(name)}",
            hint="--method expert_upcycling gives it more experts; upcycle compress, with naee or slim, makes it smaller",
        )
    given: Any = raw.get(TEXT)
    said = given.get("model_type") if isinstance(given, Mapping) else None
    if isinstance(said, str) and (inner := wrapper.family(said)) is not None:
        # It names a wrong key, which the stock class does not always do.
        inner.config(given, f"{where}: config.json: {TEXT}")
    kind = build_config(raw, where).text_config.model_type
    inner = wrapper.family(kind)
    if inner is None:
        others = (name for name in DESCRIBED if name not in FAMILIES and wrapper.family(name))
        known = ", ".join([*wrapper.families, *FAMILIES, *others])
        raise RefusalError(
            f"cannot convert a '{name}' model: its text model is a '{kind}' model, and of that, {reason(kind)}",
            hint=f"text models that can be converted: {known}",
        )
    return CompositeFamily(wrapper, inner)


def refuse_parts(model_type: object, what: str, hint: str | None = None) -> None:
    """Refuse a model of parts where only text models are taken; ``what`` says who takes only these, and why.

    Raises:
        RefusalError: ``model_type`` is that of a wrapper.
    """
    if model_type in WRAPPERS:
        raise RefusalError(f"a '{model_type}' model has other parts beside its text model, and {what}", hint=hint)
