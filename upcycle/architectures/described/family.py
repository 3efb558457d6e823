"""A dense family that knows its FFNs alone: every other tensor is copied under its own name, whatever it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.dense_config import FfnSize
from upcycle.architectures.described.ffn_place import DescribedModel
from upcycle.architectures.module_paths import (
    ListedPaths,
    ModulePaths,
    compare_tensors,
    described_paths,
    text_config,
)
from upcycle.architectures.refused import REASONS
from upcycle.architectures.stock_auto import is_encoder
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError
from upcycle.files.formats.tensor_files import widest
from upcycle.files.formats.tensor_names import refuse_quantized
from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from upcycle.architectures.described.find_ffns import FoundFfn

_MERGED = "adapters must be merged first; compare 'architectures' in config.json with the weights"  # a hint
_NO_LIMIT = 8192  # positions, where neither the class nor config.json has a limit: what a text is cut to


@dataclass(frozen=True)
class Turned(Origin):
    """The origin of a matrix that is stored ``[in, out]``; only whole ones are read."""

    def apply(self, block: torch.Tensor) -> torch.Tensor:
        """Return it as ``[out, in]``."""
        return super().apply(block.T.contiguous())


class DescribedFamily(Family):
    """Reads what a stock class says of itself: shapes from a model on the meta device, defaults from its configuration class.

    An instance belongs to one checkpoint of the described architecture. Names of tensors are those of its files, where
    :meth:`check` has seen these, and until then the stock class's; :meth:`model_name` leads from the first to the second.
    """

    targets = ("upcycle_moe",)
    embeds_tokens_alone = False

    def __init__(self, described: DescribedModel) -> None:
        self.described, self.module_paths = described, described.module_paths
        self.name, self.title, self.uncalibrated = described.name, described.title, described.uncalibrated
        self.returns_tuple, self.reads, self.pauses = described.returns_tuple, described.reads, described.pauses
        self.parts = tuple(part for part, _ in described.parts)
        self.unheld = REASONS.get(described.name, "")
        self.encoder = described.encoder
        self._model: Any = None
        self._ffns: list[FoundFfn] = []
        self._shapes: dict[str, tuple[int, ...]] = {}  # by the stock class's names; tied ones are left out
        self._stored: dict[str, str] = {}  # stock class's name -> stored name
        self._own: dict[str, str] = {}  # the other way

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> DenseConfig:
        """Read ``config.json`` by the stock class; see :meth:`upcycle.architectures.dense.base.Family.config`."""
        from upcycle.architectures.described.find_ffns import find_ffns
        from upcycle.architectures.stock import build_config, empty_model

        settings = build_config(raw, where)
        self._model = empty_model(settings, where)
        self._ffns = find_ffns(self._model, self.described)
        self.module_paths = self._with_closing(described_paths(self.described, settings).found_in(self._model))
        if self.described.both_ways and is_encoder(settings):
            self.pauses = self.encoder = True
        tied = set(self._model.all_tied_weights_keys)
        self._shapes = {n: tuple(t.shape) for n, t in self._model.state_dict().items() if n not in tied}
        for ffn in self._ffns:
            if ffn.biases and ffn.biases != {"up", "down"} | ({"gate"} if ffn.place.gated else set()):
                raise RefusalError(f"{where}: some projections of its FFN have biases and others have none")
        sizes = [
            FfnSize(f.hidden, f.width, f.activation, bool(f.biases), f.place.gated, f.other_output) for f in self._ffns
        ]
        first, text = sizes[0], text_config(settings)
        text.allow_global_per_layer_attribute_access = True  # of those that differ, the first layer's
        heads = getattr(text, "num_attention_heads", None)
        heads = heads if isinstance(heads, int) else 1  # of an encoder in stages, it has a number for each
        spread = [getattr(text, key, None) for key in ("initializer_range", "init_std")]
        limits = ("max_target_positions", "max_position_embeddings", "max_seq_len")
        context = next((found for key in limits if (found := getattr(text, key, None))), None) or raw.get("seq_length")
        skipped = (getattr(settings, "pad_token_id", None) or 0) + 1 if self.described.counts_from_padding else 0
        return DenseConfig(
            family=self.name,
            hidden_size=first.hidden_size,
            intermediate_size=first.intermediate_size,
            num_hidden_layers=len(self._ffns),
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or first.hidden_size // heads,
            vocab_size=getattr(text, "vocab_size", None) or 1,
            hidden_act=first.hidden_act,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-5),
            max_position_embeddings=(context or _NO_LIMIT) - skipped,
            initializer_range=next((float(one) for one in spread if one), 0.02),
            attention_dropout=0.0,
            tie_word_embeddings=bool(getattr(settings, "tie_word_embeddings", False)),
            rope_parameters={},
            token_ids={key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
            dtype=raw.get("dtype") or raw.get("torch_dtype"),
            windows=(None,) * len(self._ffns),
            logits_cap=getattr(text, "final_logit_softcapping", None),
            mlp_bias=first.mlp_bias,
            mlp_gated=first.mlp_gated,
            raw=raw,
            output_size=first.output_size,
            ffns=() if len(set(sizes)) == 1 else tuple(sizes),
            **{name: getattr(text, key) for name, key in self.described.multipliers.items()},
        )

    def _with_closing(self, paths: ModulePaths) -> ModulePaths:
        """Return the paths with the norms at the ends of layers: of two descriptions of a layer, its settings say which counts."""
        if not isinstance(paths, ListedPaths):
            return paths
        closing = {f"{self._prefix}{ffn.layer}": ffn.place.closing for ffn in self._ffns}
        return replace(paths, places=tuple(replace(one, closing=closing.get(one.layer)) for one in paths.places))

    def written(self, config: DenseConfig, name: str) -> str:
        """Return the name that a tensor has in the stock class."""
        return self.model_name(name)

    def model_name(self, stored: str) -> str:
        """See :meth:`upcycle.architectures.dense.base.Family.model_name`."""
        return self._own.get(stored, stored)

    def _where(self, name: str) -> str:
        return self._stored.get(name, name)

    def _some(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        found = {n: shape for n, shape in self._shapes.items() if self.module_paths.layer_of(n) == layer}
        return {self._where(name): shape for name, shape in found.items()}

    def first_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return name and shape of the token embeddings, or of what comes first where they are nowhere said to be."""
        name = self.module_paths.embedding_weight
        if name not in self._shapes:
            name = next(own for own in self._shapes if self.module_paths.layer_of(own) is None)
        return {self._where(name): self._shapes[name]}

    def last_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of all other tensors outside the layers."""
        return {name: shape for name, shape in self._some(None).items() if name not in self.first_specs(config)}

    def stored_specs(self, config: DenseConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
        """See :meth:`upcycle.architectures.dense.base.Family.stored_specs`."""
        if layer is None:
            return {**self.first_specs(config), **self.last_specs(config)}
        return self._some(layer)

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of one layer's tensors outside the FFN."""
        ffn = self.ffn_specs(config, layer)
        return {name: shape for name, shape in self._some(layer).items() if name not in ffn}

    def ffn_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the stored matrices and biases of one FFN."""
        names = {origin.name for part, origin in self.ffn_origins(config, layer).items() if "norm" not in part}
        return {name: shape for name, shape in self._some(layer).items() if name in names}

    def ffn_origins(self, config: DenseConfig, layer: int) -> dict[str, Origin]:
        """Return where gate, up, down and their biases come from, and ``norm`` and, of a LayerNorm, ``norm_bias``."""
        ffn, body = self._ffns[layer], self._prefix
        kind, found = Turned if ffn.place.columns else Origin, dict[str, Origin]()
        for part in config.at(layer).ffn_form.matrices:
            name, rows = f"{body}{ffn.path(part)}", None
            if ffn.place.fused and part != "down":
                rows = (ffn.place.fused.split().index(part) * ffn.width, ffn.width)
            found[part] = kind(self._where(f"{name}.weight"), rows)
            if part in ffn.biases:
                found[f"{part}_bias"] = Origin(self._where(f"{name}.bias"), rows)
        for norm, end, add in (("norm", "weight", ffn.place.norm_add), ("norm_bias", "bias", 0.0)):
            name = f"{body}{ffn.norm}.{end}"
            if name in self._shapes:
                found[norm] = Origin(self._where(name), add=add)
        return found

    def ffn_dtype(self, config: DenseConfig, specs: Mapping[str, TensorSpec], layer: int, dtype: str = "keep") -> str:
        """See :meth:`upcycle.architectures.dense.base.Family.ffn_dtype`."""
        if dtype != "keep":
            return dtype
        origins = self.ffn_origins(config, layer)
        return widest(specs[origins[part].name].dtype for part in config.at(layer).ffn_form.matrices)

    def norms_below(self, layer: int) -> list[str]:
        """See :meth:`upcycle.architectures.dense.base.Family.norms_below`."""
        below = [f"{self._ffns[i].layer}.{norm}" for i in range(layer) for norm in self.described.added]
        names = [*below, *(f"{self._ffns[layer].layer}.{norm}" for norm in self.described.added[:1])]
        return [f"{self._prefix}{name}.weight" for name in names]

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return where the tensor of that name in the stock class comes from."""
        return Origin(self._where(name))

    def replaced_modules(self, layer: int) -> tuple[str, ...]:
        """See :meth:`upcycle.architectures.dense.base.Family.replaced_modules`."""
        return self._ffns[layer].replaced

    def layers_of(self, parts: tuple[str, ...], layers: int) -> tuple[int, ...]:
        """See :meth:`upcycle.architectures.dense.base.Family.layers_of`."""
        begins = tuple(begin for part, begin in self.described.parts if part in parts) or ""
        return tuple(i for i, ffn in enumerate(self._ffns) if ffn.layer.startswith(begins))

    def moved(self, layer: int) -> dict[str, str]:
        """See :meth:`upcycle.architectures.dense.base.Family.moved`."""
        ffn = self._ffns[layer]
        if ffn.place.learned is None:
            return {}
        old, new = f"{self._prefix}{ffn.layer}.{ffn.place.learned}.", f"{self._prefix}{ffn.replaced[0]}.experts.act."
        return {self._where(n): new + n.removeprefix(old) for n in self._shapes if n.startswith(old)}

    def ffn_dropout(self, layer: int) -> float:
        """See :meth:`upcycle.architectures.dense.base.Family.ffn_dropout`."""
        return self._ffns[layer].dropout

    @property
    def _prefix(self) -> str:
        """What comes before paths below the base model."""
        return f"{self._model.base_model_prefix}." if self._model.base_model is not self._model else ""

    def check_known_whole(self, method: str) -> None:
        """See :meth:`upcycle.architectures.dense.base.Family.check_known_whole`."""
        raise RefusalError(
            f"{method} does not work on a {self.name} model: this version knows only its FFNs, which is enough for copies and splits",
            hint="--method sparse_upcycling, or a split such as random_split",
        )

    def check(
        self,
        config: DenseConfig,
        specs: Mapping[str, TensorSpec],
        where: str,
        raw: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Find every tensor of the stock class in the files, by transformers' own rules; see ``Family.check``.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape; the message names it.
        """
        from upcycle.architectures.stock_classes import may_be_missing, not_loaded, stock_name_of

        known, buffers = set(self._model.state_dict()), not_loaded(self._model)
        self._own = {
            stored: name
            for stored, name in stock_name_of(self._model, specs).items()
            if name in known or not buffers.search(stored)
        }
        refuse_quantized({stored: specs[stored] for stored in self._own}, raw, where)
        self._stored = {}
        for stored, name in self._own.items():
            self._stored.setdefault(name, stored)
        computed = may_be_missing(self._model)
        self._shapes = {n: shape for n, shape in self._shapes.items() if n in self._stored or not computed.search(n)}
        expected = {self._where(name): shape for name, shape in self._shapes.items()}
        unexpected = sorted(stored for stored, name in self._own.items() if name not in known)
        compare_tensors(expected, specs, unexpected, self.name, where, _MERGED)
