"""Checks, before a weight is read, that several checkpoints can be mixed, and says what differs if they cannot."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense_config import DenseConfig
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint

# Fields that do not change the function of the weights: settings of training, and which ids begin and end a text.
_MAY_DIFFER = {"initializer_range", "attention_dropout", "dtype", "max_position_embeddings", "token_ids"}
# The fields that matter where only FFNs are read: their shapes, their activation, and what their output is added to.
_OF_EXPERTS = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_act",
    "mlp_bias",
    "residual_multiplier",
    "special",
}
# Field of DenseConfig -> the key of config.json that decides it, where the names differ. A family's aliases take precedence.
_KEYS = {
    "family": "model_type",
    "logits_multiplier": "logits_scaling",
    "output_bias": "attention_bias",
    "qkv_bias": "attention_bias",
    "query_norms": "model_type",
    "special": "model_type",
    "windows": "sliding_window",
}
_NAMED = 5  # most tokens that a message lists
_ONE_ANCESTOR = "mixing takes fine-tunes of one model; leave this source out"
_FFNS_ONLY = f"{_ONE_ANCESTOR}, or with --method branch_train_mix take FFNs only: --param rest=base"


def check_sources(members: Sequence[DenseCheckpoint], dtype: str, tokenizers: bool, experts_only: bool = False) -> None:
    """Compare every checkpoint with the base, which is the last of ``members``.

    Args:
        members: the checkpoints.
        dtype: the recipe's dtype; for ``keep``, tensors' dtypes are compared, too.
        tokenizers: compare tokenizers.
        experts_only: compare only what FFNs depend on, since nothing else is read from members that are not the base.

    Raises:
        UsageError: two differ; the message names both sources, the key and both values.
    """
    base = members[-1]
    for member in members[:-1]:
        if member is base:
            continue
        names = base.source.name, member.source.name
        check_configs(base.config, member.config, *names, base.family.aliases, experts_only)
        if experts_only:
            if dtype == "keep":
                _check_expert_dtypes(base, member)
            continue
        if tokenizers:
            check_tokenizers(base, member)
        _check_vocabulary(base, member)
        if dtype == "keep":
            _check_dtypes(base, member)


def check_configs(
    base: DenseConfig,
    other: DenseConfig,
    base_name: str,
    other_name: str,
    aliases: Mapping[str, str],
    experts_only: bool = False,
) -> None:
    """Refuse configurations that differ in anything that changes the function, or with ``experts_only`` that of FFNs.

    ``vocab_size`` is left to the comparison of tokenizers, whose message says more.

    Raises:
        UsageError: they differ; the message names both sources, the key and both values.
    """
    hint = _ONE_ANCESTOR if experts_only else _FFNS_ONLY
    for field in fields(base):
        if (
            field.name == "vocab_size"
            or not field.compare
            or (field.name not in _OF_EXPERTS if experts_only else field.name in _MAY_DIFFER)
        ):
            continue
        ours, theirs = getattr(base, field.name), getattr(other, field.name)
        if ours == theirs:
            continue
        key = aliases.get(field.name, _KEYS.get(field.name, field.name))
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            inner = min(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
            key = inner if field.name in ("extra", "parts") else f"{key}.{inner}"
            ours, theirs = ours.get(inner), theirs.get(inner)
        elif key == "model_type":
            ours, theirs = (f"{config.family} ({_plain(value)})" for config, value in ((base, ours), (other, theirs)))
            ours, theirs = (
                text.removesuffix(f" ({config.family})") for text, config in ((ours, base), (theirs, other))
            )
        elif field.name == "windows":
            ours, theirs = _windows(base), _windows(other)
        raise UsageError(
            f"sources differ: config.json's '{key}' is {_plain(ours)} in {base_name} and {_plain(theirs)} in {other_name}",
            hint=hint
            if other.intermediate_size == base.intermediate_size and other.hidden_size == base.hidden_size
            else _ONE_ANCESTOR,
        )


def _windows(config: DenseConfig) -> str:
    kinds = sorted({str(window) for window in config.windows})
    return kinds[0] if len(kinds) == 1 else f"{' and '.join(kinds)} by layer"


def _plain(value: Any) -> Any:
    """Return a value as a message shows it: for a set of features their descriptions, sorted."""
    return sorted(feature.value for feature in value) if isinstance(value, frozenset) else value


def _check_vocabulary(base: DenseCheckpoint, member: DenseCheckpoint) -> None:
    ours, theirs = base.config.vocab_size, member.config.vocab_size
    if ours != theirs:
        raise UsageError(
            f"sources differ: config.json's 'vocab_size' is {ours} in {base.source.name} and {theirs} in "
            f"{member.source.name}",
            hint="cut or fill up the embeddings of one of them (resize_token_embeddings), so that ids mean the same",
        )


def _check_dtypes(base: DenseCheckpoint, member: DenseCheckpoint) -> None:
    for name in base.family.all_stored_specs(base.config):
        ours, theirs = base.store.specs[name].dtype, member.store.specs[name].dtype
        if ours != theirs:
            raise UsageError(
                f"sources differ: tensor '{name}' is {ours} in {base.source.name} and {theirs} in {member.source.name}",
                hint=f"choose the dtype to write, for example --dtype {ours}",
            )


def _check_expert_dtypes(base: DenseCheckpoint, member: DenseCheckpoint) -> None:
    for layer in range(base.config.num_hidden_layers):
        ours, theirs = (each.family.ffn_dtype(each.config, each.store.specs, layer) for each in (base, member))
        if ours != theirs:
            raise UsageError(
                f"sources differ: the FFN of layer {layer} is {ours} in {base.source.name} and {theirs} in {member.source.name}",
                hint=f"choose the dtype to write, for example --dtype {ours}",
            )


def check_tokenizers(base: Checkpoint, member: Checkpoint, hint: str = "") -> None:
    """Check that tokens have the same ids and that text is split in the same way; a source without a tokenizer uses the base's.

    Args:
        base: the model whose tokenizer the result has.
        member: another one.
        hint: what to do where they differ; empty: the usual.

    Raises:
        UsageError: they differ; the message names both sources, and tokens.
    """
    names = base.source.name, member.source.name
    paths = [source.path / "tokenizer.json" for source in (base.source, member.source)]
    if not all(map(Path.is_file, paths)) or filecmp.cmp(paths[0], paths[1], shallow=False):
        return  # most fine-tunes have the same file, which then need not be parsed
    ours, theirs = (read_json(path) for path in paths)
    one, two = _token_ids(ours), _token_ids(theirs)
    unlike = sorted((token for token in {*one, *two} if one.get(token) != two.get(token)), key=_order(one, two))
    if unlike:
        listed = ", ".join(f"{token!r} ({_id(one, token)}, {_id(two, token)})" for token in unlike[:_NAMED])
        more = f" and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
        raise UsageError(
            f"sources differ: tokenizer.json of {names[0]} and of {names[1]} give different ids to {len(unlike)} "
            f"token{'s' * (len(unlike) > 1)}: {listed}{more}",
            hint=hint
            or "mix models that share a vocabulary; if only unused added tokens differ, give both the same tokenizer files",
        )
    for key in ("merges", "type"):
        if ours.get("model", {}).get(key) != theirs.get("model", {}).get(key):
            raise UsageError(
                f"sources differ: tokenizer.json's 'model.{key}' is not the same in {names[0]} and {names[1]}: they split "
                "text in different ways",
                hint=hint or _FFNS_ONLY,
            )


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return {**vocabulary, **added}


def _order(one: Mapping[str, int], two: Mapping[str, int]) -> Any:
    """Return the sort key that lists tokens with the largest ids first, as added tokens are the likely difference."""
    return lambda token: (-max(one.get(token, -1), two.get(token, -1)), token)


def _id(ids: Mapping[str, int], token: str) -> str:
    return str(ids[token]) if token in ids else "absent"
