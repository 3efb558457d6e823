"""The description of a dense architecture: how its configuration is read, and where its tensors are."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from upcycle.architectures.dense_config import DenseConfig, Feature
from upcycle.architectures.module_paths import ModulePaths, check_layers, compare_tensors
from upcycle.architectures.rope import rope_parameters
from upcycle.architectures.tensor_origin import Origin, halves, is_rotated
from upcycle.errors import CheckpointError, RefusalError
from upcycle.ffn.form import FfnForm
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.settings import ValueKind, checked
from upcycle.files.formats.tensor_files import widest
from upcycle.files.formats.tensor_names import refuse_quantized, unlike_family
from upcycle.files.formats.tensor_spec import TensorSpec

__all__ = ["DenseConfig", "Family", "Feature", "rope_parameters"]


class Family(ABC):
    """Describes a dense architecture. Subclasses state the defaults of their stock configuration class, and override what differs.

    ``defaults`` holds the value that transformers' class takes when ``config.json`` lacks the key. A wrong default would be
    a silent error, so a contract test compares every one with the class itself. ``aliases`` gives the family's own
    spelling of a key.

    There are two sets of tensor names: those in the checkpoint (:meth:`stored_specs`), and those that targets read (the other
    ``_specs``), which are Llama's, with the rows of rotated projections in halves. :meth:`origin` leads from the second to the
    first.
    """

    name: str
    title: str
    targets: tuple[str, ...]  # preferred first
    unheld: str = ""  # why no stock target holds it
    elsewhere: Mapping[Feature, str] = {}  # feature -> which target could hold it, for refusals
    defaults: ClassVar[Mapping[str, Any]] = {  # Llama's, which several classes took over
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    aliases: Mapping[str, str] = {}
    keys: ClassVar[Mapping[str, ValueKind]] = {}  # the family's own keys, and common keys that take other values here
    layer_kinds: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")  # the values of layer_types
    token_defaults: ClassVar[Mapping[str, Any]] = {}
    rope_theta: ClassVar[float] = 10000.0
    partial_rotary_factor: ClassVar[float | None] = None  # default; None: the class does not know the key
    gated: ClassVar[bool] = True  # whether the FFN is down(act(gate x) * up x), or down(act(up x))
    must_divide: ClassVar[bool] = False  # the stock class refuses a stream that the heads do not divide
    rotates_pairs: ClassVar[bool] = False  # rotary embedding turns rows 2i and 2i + 1, not i and i + head/2
    module_paths: ModulePaths = ModulePaths()
    uncalibrated: str | None = None  # why calibration does not work here
    pauses: bool = False  # see upcycle.architectures.described.ffn_place.DescribedModel
    remark: str = ""  # what the user should know about every conversion of this family
    unread: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)  # ends of names of buffers that old files hold
    reads: str = "text"  # see upcycle.architectures.described.ffn_place.Reads
    calibrates_on: str = ""  # what calibration reads, where that is more than ``reads``: images in texts
    parts: tuple[str, ...] = ()  # of a model whose towers can be converted one by one
    encoder: bool = False  # it attends in both directions, and predicts no next token
    # Whether the first layer reads token embeddings times a factor, and nothing else.
    embeds_tokens_alone: bool = True
    returns_tuple: bool = False  # a layer returns a tuple, whose first entry is the stream

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> DenseConfig:
        """Read ``config.json``; ``where`` is its name in messages.

        Raises:
            RefusalError: the configuration needs something that no target can hold.
            CheckpointError: a value is invalid.
        """
        file, raw = raw, checked(raw, self.keys, self.aliases, where)
        self._refuse_unheld(raw, where)
        values = self.values(raw)
        heads, hidden, layers = (values[k] for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        key_heads, head = values["num_key_value_heads"] or heads, values.get("head_dim") or hidden // heads
        rope = self.rope(raw, values, where)
        config = DenseConfig(
            family=self.name,
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head,
            vocab_size=values["vocab_size"],
            hidden_act=values["hidden_act"],
            rms_norm_eps=values["rms_norm_eps"],
            max_position_embeddings=values["max_position_embeddings"],
            initializer_range=values["initializer_range"],
            attention_dropout=values["attention_dropout"],
            tie_word_embeddings=values["tie_word_embeddings"],
            rope_parameters=rope,
            token_ids={key: raw.get(key, self.token_defaults.get(key)) for key in _TOKEN_IDS},
            dtype=raw.get("dtype") or raw.get("torch_dtype"),
            windows=self.windows(raw, layers),
            thetas=self.thetas(raw, layers, rope["rope_theta"]),
            raw=file,
            **{"mlp_gated": self.gated, **self.details(raw, values)},
        )
        self._check_together(config, raw, where)
        return config

    def _refuse_unheld(self, raw: Mapping[str, Any], where: str) -> None:
        if not all(raw.get("no_rope_layers") or [True]):
            raise RefusalError(
                f"{where}: 'no_rope_layers' asks for layers without rotary position embedding (NoPE), and every layer of a "
                f"{self.name} model has one",
                hint="remove the key, or correct 'model_type' (smollm3 has such layers)",
            )

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse values that are allowed by themselves but contradict one another.

        Raises:
            CheckpointError: two values disagree; the message names the keys and both values.
        """
        heads, key_heads, kinds = config.num_attention_heads, config.num_key_value_heads, raw.get("layer_types")
        rope, length = (
            config.rope_parameters,
            config.rotated_dim,
        )
        pad = config.token_ids["pad_token_id"]
        wrong = None
        if heads % key_heads:
            wrong = f"'num_attention_heads' {heads} is not a multiple of 'num_key_value_heads' {key_heads}"
        elif self.must_divide and config.hidden_size % heads:
            wrong = f"'hidden_size' {config.hidden_size} is not a multiple of 'num_attention_heads' {heads}"
        elif config.head_dim < 1:
            wrong = f"'hidden_size' {config.hidden_size} is less than 'num_attention_heads' {heads}"
        elif config.head_dim > _LEAST_ODD_HEAD and config.head_dim % 2 and length == config.head_dim:
            wrong = f"'head_dim' (or 'hidden_size' over 'num_attention_heads') is {config.head_dim}, and a rotation needs pairs"
        elif kinds is not None and len(kinds) != config.num_hidden_layers:
            wrong = f"'layer_types' has {len(kinds)} entries, 'num_hidden_layers' is {config.num_hidden_layers}"
        elif kinds is not None and (odd := [kind for kind in kinds if kind not in self.layer_kinds]):
            wrong = f"'layer_types' has the entry {shortened(odd[0])}; those of {self.name} are {', '.join(self.layer_kinds)}"
        elif pad is not None and not -config.vocab_size <= pad < config.vocab_size:
            wrong = f"'pad_token_id' is {shortened(repr(pad))}, 'vocab_size' {config.vocab_size}"
        for key in ("short_factor", "long_factor"):
            if rope["rope_type"] == "longrope" and len(rope[key]) != length // 2:
                wrong = (
                    wrong
                    or f"'rope_parameters.{key}' has {len(rope[key])} numbers, half a head's rotated part {length // 2}"
                )
        if wrong:
            raise CheckpointError(f"{where}: {wrong}", hint="correct the key, or download config.json again")

    def rope(self, raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the description of the rotary embedding, :func:`~upcycle.architectures.rope.rope_parameters`.

        Raises:
            RefusalError: the stock class would not rotate as the configuration says.
        """
        context = values["max_position_embeddings"]
        rope = rope_parameters(raw, self.rope_theta, self.partial_rotary_factor, context, where)
        if self.partial_rotary_factor is None and rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise RefusalError(
                f"{where}: 'partial_rotary_factor' is {rope['partial_rotary_factor']}, and a {self.name} model rotates "
                "whole heads",
                hint="remove the key, or correct 'model_type'",
            )
        return rope

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the keys of ``defaults`` and ``head_dim``, from ``config.json`` where it has them; null stays null."""
        defaults = {"head_dim": None, **self.defaults}
        spelt = {key: self.aliases.get(key, key) for key in defaults}
        return {**defaults, **{key: raw[own] for key, own in spelt.items() if own in raw}}

    def rewritten(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a ``config.json`` as a start for another model of this family: it names the stock class, and no other code."""
        config = {key: value for key, value in raw.items() if key != "auto_map"}
        if not config.get("architectures"):  # a .gguf file names none
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.name]]
        return config

    def narrowed(self, raw: Mapping[str, Any], width: int) -> dict[str, Any]:
        """Return the ``config.json`` of the same model with FFNs of ``width`` neurons."""
        return {**self.rewritten(raw), self.aliases.get("intermediate_size", "intermediate_size"): width}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the sliding window of every layer, in tokens; None attends to everything."""
        return (None,) * layers

    def thetas(self, raw: Mapping[str, Any], layers: int, theta: float) -> tuple[float, ...]:
        """Return the theta of every layer's rotary embedding, 0 where it has none; empty: all have ``theta``."""
        return ()

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, norms, multipliers and special features, as keyword arguments of DenseConfig."""
        return {}

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return the names of one dense FFN's tensors: ``gate`` and ``up`` ``[F, d]``, ``down`` ``[d, F]``, input ``norm`` ``[d]``.

        Without a norm before the FFN, or a weight of it, there is no ``norm``; an FFN without a gate has no ``gate``.
        """
        prefix = self.module_paths.layer(layer)
        names: dict[str, str] = {
            part: f"{prefix}.mlp.{part}_proj.weight" for part in FfnForm(gated=self.gated).matrices
        }
        return {**names, "norm": f"{prefix}.post_attention_layernorm.weight"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of one decoder layer's tensors outside the FFN."""
        d, head = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,)}
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{part}_proj.weight"] = (rows, d)
            if config.qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (rows,)
        shapes["self_attn.o_proj.weight"] = (d, q)
        if config.output_bias:
            shapes["self_attn.o_proj.bias"] = (d,)
        if config.query_norms:
            shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        shapes["post_attention_layernorm.weight"] = (d,)
        return {f"{self.module_paths.layer(layer)}.{name}": shape for name, shape in shapes.items()}

    def ffn_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the matrices and biases of one dense FFN."""
        d, width, names = config.hidden_size, config.intermediate_size, self.ffn_names(layer)
        sizes = {"gate": (width, d), "up": (width, d), "down": (d, width)}
        shapes: dict[str, tuple[int, ...]] = {names[part]: sizes[part] for part in config.ffn_form.matrices}
        if config.mlp_bias:  # listed, so that a refusal names the feature and not an unexpected tensor
            shapes |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
        return shapes

    def first_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors before the layers: the embeddings."""
        return {self.module_paths.embedding_weight: (config.vocab_size, config.hidden_size)}

    def last_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors after the layers: the final norm, and the head unless it is tied."""
        size, paths = (config.vocab_size, config.hidden_size), self.module_paths
        head = {} if config.tie_word_embeddings else {paths.head_weight: size}
        return {paths.final_norm_weight: (config.hidden_size,), **head}

    def stored_specs(self, config: DenseConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors that the checkpoint holds for one layer, or (None) outside the layers."""
        if layer is None:
            return {**self.first_specs(config), **self.last_specs(config)}
        return {**self.layer_specs(config, layer), **self.ffn_specs(config, layer)}

    def tower_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors of parts other than the text model, which are kept as they are."""
        return {}

    def stock_names(self, raw: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
        """Return the stored names by their names in the stock class; empty where all tensors are stored under the latter."""
        return {}

    def spelt(self, config: DenseConfig, names: Mapping[str, str]) -> DenseConfig:
        """Return the configuration with the names that tensors have in the source's files, where it keeps them."""
        return config

    def written(self, config: DenseConfig, name: str) -> str:
        """Return the name under which a tensor is written into another model of this family."""
        return name

    def all_stored_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of all tensors that the checkpoint holds."""
        specs = self.stored_specs(config, None) | self.tower_specs(config)
        for layer in range(config.num_hidden_layers):
            specs |= self.stored_specs(config, layer)
        return specs

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return where the tensor that targets call ``name`` comes from."""
        origin = Origin(name)
        rotated = config.rotated_dim
        return origin.ordered(halves(config.head_dim, rotated)) if self.rotates_pairs and is_rotated(name) else origin

    def ffn_origins(self, config: DenseConfig, layer: int) -> dict[str, Origin]:
        """Return where the tensors of :meth:`ffn_names` come from; ``norm`` is the factor that the norm applies.

        Where the FFN has biases, they are there, too: ``gate_bias``, ``up_bias`` and ``down_bias``; and where the norm adds a
        bias, ``norm_bias``.
        """
        names = self.ffn_names(layer)
        if config.mlp_bias:
            names |= {f"{part}_bias": f"{names[part].removesuffix('weight')}bias" for part in config.ffn_form.matrices}
        return {part: self.origin(config, name) for part, name in names.items()}

    def model_name(self, stored: str) -> str:
        """Return the name that a stored tensor has in the stock class."""
        return stored

    def check_known_whole(self, method: str) -> None:
        """Refuse a method that needs to know more of a model than its FFNs, where these are all that is described.

        Raises:
            RefusalError: this family is described by its FFNs alone.
        """
        return

    def replaced_modules(self, layer: int) -> tuple[str, ...]:
        """Return the modules, below the base model, that go where experts take the place of a layer's FFN; they stand at the first."""
        return (self.module_paths.block_of(layer).removeprefix(f"{self.module_paths.body}."),)

    def layers_of(self, parts: tuple[str, ...], layers: int) -> tuple[int, ...]:
        """Return the layers of some of its ``parts``, of a model with so many; for any other word all of them."""
        return tuple(range(layers))

    def reads_a_norm(self, layer: int) -> bool:
        """Return whether an FFN reads what a norm puts out, or a stream of which every part went through one."""
        return True

    def moved(self, layer: int) -> dict[str, str]:
        """Return new names of stored tensors of an FFN that experts share: the weights of its activation, where it has some."""
        return {}

    def ffn_dropout(self, layer: int) -> float:
        """Return the probability of a dropout inside those modules, at their end."""
        return 0.0

    def ffn_dtype(self, config: DenseConfig, specs: Mapping[str, TensorSpec], layer: int, dtype: str = "keep") -> str:
        """Return the dtype of a layer's experts: ``dtype``, or for ``keep`` the narrowest that holds the stored FFN's matrices."""
        if dtype != "keep":
            return dtype
        origins = self.ffn_origins(config, layer)
        return widest(specs[origins[part].name].dtype for part in config.ffn_form.matrices)

    def norms_below(self, layer: int) -> list[str]:
        """Return the names of the norms of all outputs added to the stream below an FFN that reads the stream without a norm.

        They bound the length of the FFN's input. Empty where a norm comes before the FFN.
        """
        return []

    def check(
        self,
        config: DenseConfig,
        specs: Mapping[str, TensorSpec],
        where: str,
        raw: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Compare a checkpoint's tensors with those that its configuration calls for.

        Args:
            config: the configuration, as it was read.
            specs: shape and dtype of every stored tensor.
            where: the checkpoint's name in messages.
            raw: its ``config.json``.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape; the message names it.
        """
        refuse_quantized(specs, raw, where)
        check_layers(config.num_hidden_layers, specs, self.module_paths, where)
        expected = self.all_stored_specs(config)
        if other := unlike_family(specs, expected, where):
            raise other
        others = set(specs) - set(expected) - {self.module_paths.head_weight}
        unexpected = sorted(name for name in others if not name.endswith(self.unread))
        compare_tensors(expected, specs, unexpected, self.name, where, _DECLARED)


_LEAST_ODD_HEAD = 4  # above this size, stock classes refuse an odd head
_DECLARED = "biases must be declared in config.json (attention_bias, mlp_bias); adapters must be merged first"  # a hint


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
