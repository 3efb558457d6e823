"""A model of parts of which more than the text model is converted: the whole stock class, whose FFNs are found part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from upcycle.architectures.dense_config import DenseConfig
from upcycle.architectures.described.family import DescribedFamily
from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import submodule
from upcycle.architectures.stock import build_config, empty_model
from upcycle.architectures.towers.composite import CompositeConfig, CompositeFamily
from upcycle.architectures.towers.part_places import PartPlaces, connector_places, text_places, vision_places
from upcycle.errors import RefusalError

LANGUAGE = "language"
IMAGES_IN_TEXT = "images in text"
_UNHELD = "no stock class has experts in an encoder of images, or between two parts"
_NOT_CALIBRATED = "calibration gives it images in texts, and it reads sounds"


class PartsFamily(DescribedFamily):
    """Describes a model of parts by the FFNs of all its parts; which of them become experts is a key of the recipe.

    Layers are numbered through: those of the text model, then those of the encoder of images, then the connector's.

    Args:
        composite: the same model, as its text model alone is converted.

    Attributes:
        missing: parts without FFNs that experts can stand for -> why.
    """

    def __init__(self, composite: CompositeFamily) -> None:
        self.wrapper, self.composite = composite.wrapper, composite
        super().__init__(DescribedModel(self.wrapper.name, self.wrapper.title, ()))
        self.module_paths = composite.module_paths
        self.title, self.remark, self.unheld = composite.title, composite.remark, _UNHELD
        self.pauses, self.calibrates_on = True, IMAGES_IN_TEXT
        self.uncalibrated = None if self.wrapper.kind == "image" else _NOT_CALIBRATED
        self.missing: dict[str, str] = {}
        self._places: dict[str, tuple[FfnPlace, ...]] = {}
        self._spelling: dict[str, str] = {}

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> DenseConfig:
        """Read ``config.json``, and find the FFNs of every part; see :meth:`upcycle.architectures.dense.base.Family.config`."""
        text = self.composite.config(raw, where)
        settings = build_config(raw, where)
        model = empty_model(settings, where)
        found = {
            LANGUAGE: self._language(model, text),
            "vision": vision_places(model.base_model),
            "connector": connector_places(model.base_model, settings),
        }
        self._places = {part: one.places for part, one in found.items() if one.places}
        self.missing = {part: one.why for part, one in found.items() if not one.places}
        self.parts = tuple(self._places)
        places = tuple(place for some in self._places.values() for place in some)
        self.described = DescribedModel(self.name, self.title, places)
        if not places:
            raise RefusalError(f"{where}: no part of a {self.name} model has FFNs that are known: {self.missing}")
        dense = super().config(raw, where)
        own = self.composite.module_paths
        # Behind the number of a layer, names are found by its path; all others, as in the text model.
        self.module_paths = replace(
            self.described.module_paths.found_in(self._model),
            embedding=own.embedding,
            final_norm=own.final_norm,
            head=own.head,
        )
        return replace(dense, embedding_multiplier=text.embedding_multiplier)

    def _language(self, model: Any, text: CompositeConfig) -> PartPlaces:
        """Return the FFNs of the text model: as they are described, or as its family names their tensors."""
        base, body = model.base_model, self.wrapper.body.partition(".")[2]
        inner = self.composite.inner
        if isinstance(inner, DescribedFamily):
            described = DescribedModel(
                inner.name, inner.title, text_places(base, body, inner.described.ffns, model.config.text_config)
            )
            return PartPlaces(described.ffns, f"the FFNs of its text model ({inner.title}) were not found")
        prefix, found = f"{model.base_model_prefix}.", dict[FfnPlace, None]()
        for layer in range(text.num_hidden_layers):
            place = self._named_place(text, layer, prefix)
            if place is None or submodule(base, f"{place.layer.format(layer)}.{place.up}") is None:
                why = f"its text model ({inner.title}) stores its FFNs in another order than it computes them"
                return PartPlaces(why=why)
            found[place] = None
        return PartPlaces(tuple(found))

    def _named_place(self, text: CompositeConfig, layer: int, prefix: str) -> FfnPlace | None:
        """Return the place of one FFN of the text model by the names of its tensors; None: these are not its modules' own."""
        family, origins = self.composite, self.composite.ffn_origins(text, layer)
        path = family.module_paths.layer(layer)
        matrices = [origins[part] for part in text.ffn_form.matrices]
        if any(one.order or one.centred or one.filled or one.times != 1 for one in matrices):
            return None
        below = {part: one.name.removeprefix(f"{path}.").removesuffix(".weight") for part, one in origins.items()}
        own = path.removeprefix(prefix)
        replaced = [module.removeprefix(f"{own}.") for module in family.replaced_modules(layer)]
        fused: Any = None
        if "gate" in below and below["gate"] == below["up"]:
            rows = {part: (origins[part].rows or (0, 0))[0] for part in ("gate", "up")}
            fused = "gate up" if rows["gate"] < rows["up"] else "up gate"
        return FfnPlace(
            f"{own.removesuffix(str(layer))}{{}}",
            below["up"],
            below["down"],
            gate=None if fused else below.get("gate"),
            fused=fused,
            whole=replaced[0] if len(replaced) == 1 else None,
            act=replaced[1] if len(replaced) > 1 else None,
            norm=below.get("norm"),
            norm_add=origins["norm"].add if "norm" in origins else 0.0,
            activation=f"={text.hidden_act}",
        )

    def stock_names(self, raw: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
        """Return the stored names by their names in the stock class, without those of tensors that this class leaves out."""
        return self.composite.stock_names(raw, stored)

    def spelt(self, config: DenseConfig, names: Mapping[str, str]) -> DenseConfig:
        """Keep the names that tensors have in the source's files, by their names in the stock class."""
        self._spelling = dict(names)
        return config

    def written(self, config: DenseConfig, name: str) -> str:
        """Return the name that the source's files have for a tensor; one that they do not have gets the prefix of its neighbours."""
        if name in self._spelling or not self._spelling:
            return self._spelling.get(name, name)
        place = name
        while place := place.rpartition(".")[0]:
            for stock, stored in self._spelling.items():
                end = stock.removeprefix(place)
                if stock.startswith(f"{place}.") and stored.endswith(end):
                    return stored.removesuffix(end) + name.removeprefix(place)
        return name

    def rewritten(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a ``config.json`` as a start for another model of this family."""
        return self.composite.rewritten(raw)

    def layers_of(self, parts: tuple[str, ...], layers: int) -> tuple[int, ...]:
        """Return the layers of these parts; of ``all``, those of every part."""
        wanted = [place for part, some in self._places.items() if "all" in parts or part in parts for place in some]
        return tuple(i for i, ffn in enumerate(self._ffns) if ffn.place in wanted)

    def reads_a_norm(self, layer: int) -> bool:
        """Return False for a connector without a norm: it reads what the encoder puts out, and no stream of embeddings."""
        return self._ffns[layer].place in self._places.get(LANGUAGE, ()) or self._ffns[layer].norm is not None

    def norms_below(self, layer: int) -> list[str]:
        """Return the names of the norms of all outputs added to the text model's stream below an FFN that reads it without one."""
        return self.composite.norms_below(layer)
