"""Opens one domain of a recipe: its documents, its encoder and cache, and the rule for what is too long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files import user_paths
from upcycle.files.user_paths import user_path
from upcycle.recipe.conversion_recipe import parse_size
from upcycle.text.reading.columns import Reading
from upcycle.text.windows import Frame
from upcycle.trainers.data.chat_templates import find_template
from upcycle.trainers.data.corpus import Corpus, open_corpus
from upcycle.trainers.data.domain_rows import SHARDS_TOGETHER
from upcycle.trainers.data.example_encoder import ExampleEncoder
from upcycle.trainers.data.token_shards import Encoder, TokenCache
from upcycle.trainers.pictures.pictures import Pictures
from upcycle.trainers.recipe.data_recipe import DataRecipe, DomainRecipe, TooLong


def open_domain(data: DataRecipe, domain: DomainRecipe, pictures: Pictures | None = None) -> Corpus:
    """A domain's documents; ``pictures`` is what the model reads of images, if it reads any.

    Raises:
        UpcycleError: they cannot be read, or a key of the domain does not suit them.
    """
    return _opened(data, domain, domain.text, domain.revision, pictures)


def domain_contents(data: DataRecipe) -> dict[str, dict[str, str]]:
    """Name -> fingerprint of every file or dataset that a domain reads, its validation files too, by domain.

    Raises:
        UpcycleError: as :func:`open_domain`.
    """
    found = {}
    for domain in data.domains:
        corpus = open_domain(data, domain)
        files = open_domain_validation(data, domain, corpus)
        found[domain.name] = {**corpus.contents(), **(files.contents() if files else {})}
    return found


def data_have_images(data: DataRecipe, pictures: Pictures | None) -> bool:
    """Whether a domain has images, and the model reads them.

    Raises:
        UpcycleError: as :func:`open_domain`.
    """
    return pictures is not None and any(open_domain(data, domain, pictures).pictured for domain in data.domains)


def open_domain_validation(
    data: DataRecipe, domain: DomainRecipe, corpus: Corpus, pictures: Pictures | None = None
) -> Corpus | None:
    """The documents of a domain's own validation files, if it has any; ``corpus`` are those that it trains on.

    Raises:
        UpcycleError: as :func:`open_domain`, or one is text and the other is not.
    """
    if domain.validation is None:
        return None
    files = _opened(data, domain, domain.validation, None, pictures)
    if files.kind != corpus.kind:
        names = {"text": "text", "chat": "conversations", "pairs": "pairs", "preferences": "preferences"}
        raise UsageError(
            f"domain '{domain.name}' trains on {names[corpus.kind]}, and its validation files hold {names[files.kind]}",
            hint="validate on files of the same form",
        )
    return files


def _opened(
    data: DataRecipe, domain: DomainRecipe, texts: list[str], revision: str | None, pictures: Pictures | None
) -> Corpus:
    size = max(1, parse_size(data.shuffle) // SHARDS_TOGETHER)
    answer = domain.response or domain.chosen
    prompt = tuple(domain.prompt or ())
    reading = Reading(domain.column, domain.separator, data.broken_lines, prompt, answer, domain.rejected)
    if domain.images is not None and pictures is None:
        raise UsageError(
            f"domain '{domain.name}': images: {domain.images}, and the model reads no images", hint="leave images out"
        )
    if pictures is not None:
        folder = None if domain.images is None else str(user_path(domain.images).resolve())
        reading = replace(reading, images="maybe" if folder is None else "yes", folder=folder)
    corpus = open_corpus(texts, reading, revision, size, domain.name, domain.format)
    if corpus.pictured and pictures is not None and pictures.whole_rows and data.packing != "alone":
        raise UsageError(
            f"domain '{domain.name}' has images, and this model's positions cannot begin again within a row",
            hint="set packing: alone in the data",
        )
    if corpus.kind == "text" and domain.loss_on == "answers":
        raise UsageError(
            f"domain '{domain.name}': loss_on: answers, but it is text, which has no answers",
            hint="leave loss_on out, or name the columns: column (of conversations), or prompt and response",
        )
    if corpus.kind != "text" and data.packing == "concatenate":
        raise UsageError(
            f"domain '{domain.name}' has examples, and packing: concatenate would cut them at the end of every row",
            hint="set packing: best_fit, or alone",
        )
    return corpus


def too_long_rule(domain: DomainRecipe, corpus: Corpus) -> TooLong:
    """What becomes of the domain's documents that are longer than a row."""
    usual: dict[str, TooLong] = {"text": "split", "preferences": "drop"}
    return domain.too_long or usual.get(corpus.kind, "keep_start")


def token_cache(
    data: DataRecipe,
    domain: DomainRecipe,
    corpus: Corpus,
    tokenizer: Any,
    frame: Frame | None = None,
    pictures: Pictures | None = None,
    key: str = "data",
) -> TokenCache:
    """The cache of a domain's tokenised documents, with the encoder for what they are.

    ``frame`` are the special tokens around every text, for a masked language model, which has seen them there; ``key`` is
    where ``data`` stands in the recipe, for messages.

    Raises:
        UsageError: a masked language model is to learn examples.
        UsageError: examples need a chat template, and there is none.
        EnvironmentFault: there is no folder for a cache.
    """
    folder = token_cache_folder(data)
    if corpus.kind == "text":
        return TokenCache(folder, Encoder(tokenizer, data.end_of_text, frame))
    if frame is not None:
        raise UsageError(
            f"domain '{domain.name}' has conversations or pairs, and a masked language model learns text",
            hint="give it text: a column of strings, or text files",
        )
    plain = domain.joined == "plain"
    shown = pictures if corpus.pictured else None
    other = shown.processor if shown else None  # its template, where the tokenizer has none
    template = None if plain else find_template(tokenizer, data.chat_template, other, key)
    encoder = ExampleEncoder(tokenizer, data.end_of_text, template, domain.loss_on or "answers", shown)
    return TokenCache(folder, encoder)


def token_cache_folder(data: DataRecipe) -> Path:
    """The folder in which tokenised text is kept.

    Raises:
        EnvironmentFault: the recipe names none, and this user has no cache folder that can be written.
    """
    if data.cache:
        return user_path(data.cache)
    cache = user_paths.cache_folder()
    if cache is None:
        raise EnvironmentFault(
            "there is no folder for tokenised text: neither ~/.cache nor the one for temporary files can be written",
            hint="set cache: FOLDER in the data, or XDG_CACHE_HOME in the environment",
        )
    return cache / "tokens"
