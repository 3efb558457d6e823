"""The ``data`` key of a training recipe: domains of text, how they are mixed and packed, and what is held out."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from upcycle.plugins import StrictSettings
from upcycle.recipe.conversion_recipe import parse_size
from upcycle.text.reading.file_kinds import Format

Packing: TypeAlias = Literal["best_fit", "concatenate", "alone"]
TooLong: TypeAlias = Literal["split", "keep_start", "keep_end", "drop"]


def _list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class DomainRecipe(StrictSettings):
    """One kind of text, such as prose or code."""

    name: str = Field(min_length=1, description="its name in reports and weights")
    text: list[str] = Field(
        min_length=1,
        description="files or globs (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, else UTF-8 text; also .gz and .zst), "
        "folders of datasets' save_to_disk, demo, or one hub dataset org/name[:config[:split]]",
    )
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="its share of the rows; weights sum to 1 (left out everywhere: equal shares)",
    )
    column: str | None = Field(
        None,
        description="the column that holds the text or the conversation, in every file (left out: text, content, messages, "
        "conversations, or the only column of strings)",
    )
    prompt: list[str] | None = Field(
        None,
        min_length=1,
        description="of pairs: the column of the prompt, or several, joined by empty lines where they are not blank",
    )
    response: str | None = Field(None, description="of pairs: the column of the response")
    chosen: str | None = Field(
        None,
        description="of preferences: the column of the better answer: a conversation that ends with it, or, with prompt, it alone",
    )
    rejected: str | None = Field(None, description="of preferences: the column of the worse answer")
    joined: Literal["template", "plain"] = Field(
        "template",
        description="of pairs: template writes them as a question and its answer; plain puts one after the other as they stand",
    )
    loss_on: Literal["answers", "all"] | None = Field(
        None,
        description="the tokens that are learned: of answers, or all (left out: answers of conversations and pairs, all of text)",
    )
    too_long: TooLong | None = Field(
        None,
        description="a document longer than a row is split into several rows, or keeps only its start or its end, or is dropped "
        "(left out: split for text, keep_start for conversations and pairs)",
    )
    format: Format | None = Field(
        None,
        description="format of all its files: text, jsonl, json, csv, tsv, parquet or arrow (left out: by their endings)",
    )
    images: str | None = Field(
        None,
        description="of models that read images: the folder that the names of images in its rows are relative to (left out: that of "
        "each file, where the first row has an image)",
    )
    separator: str | None = Field(
        None,
        min_length=1,
        description="the string that divides a text file into documents (left out: a file is one document)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    validation: list[str] | None = Field(
        None, min_length=1, description="files to validate on, instead of holding out a fraction of the documents"
    )

    @field_validator("text", "validation", "prompt", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return _list(value)

    @model_validator(mode="after")
    def _columns(self) -> DomainRecipe:
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("chosen and rejected name the columns of preferences; give both")
        if self.chosen is not None:
            if self.response is not None or self.column is not None:
                raise ValueError("column and response are not for preferences, whose columns are chosen and rejected")
            if self.loss_on == "all" or self.too_long not in (None, "drop"):
                raise ValueError("preferences compare whole answers: loss_on is answers, and too_long is drop")
        elif (self.prompt is None) != (self.response is None):
            given, missing = ("prompt", "response") if self.prompt else ("response", "prompt")
            raise ValueError(f"{given} names a column of pairs, and {missing} none; give both")
        if self.response is not None and self.column is not None:
            raise ValueError(
                "column is for text and conversations, prompt and response are for pairs; give one or the other"
            )
        if self.joined == "plain" and self.response is None and not (self.chosen and self.prompt):
            raise ValueError("joined is for pairs; give the columns prompt and response")
        return self


class ValidationSplit(StrictSettings):
    """Which documents are never trained on."""

    fraction: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="share of each domain's documents that is held out, chosen by their content; of a domain that is one text, the "
        "share at its end",
    )
    tokens: int = Field(65536, ge=16, description="tokens to validate on, per domain and at most")
    batch: int = Field(8, ge=1, description="rows per validation batch")


class DynamicWeights(StrictSettings):
    """Weights that follow the excess of the domains' validation losses over reference losses (Sheared-LLaMA)."""

    form: Literal["paper", "code"] = Field(
        "paper",
        description="paper: the excess is clipped at 0; code: it is not, and the weights are mixed with uniform ones",
    )
    rate: float = Field(1.0, gt=0, allow_inf_nan=False, description="factor on the excess in the exponent")
    floor: float = Field(1e-4, ge=0, lt=1, description="code: the share of uniform weights in the mix")
    reference: dict[str, float] | None = Field(
        None,
        description="reference loss of each domain, in nats per token (left out: the dense parent's, measured on the held-out text)",
    )
    parent: str = Field(
        "auto",
        description="the dense model whose losses are measured, or auto: the one that the model was converted from",
    )


class MaskingRecipe(StrictSettings):
    """Which tokens a masked language model predicts, and what it reads in their place (BERT, arXiv 1810.04805)."""

    fraction: float = Field(0.15, gt=0, le=1, description="share of a row's tokens that are predicted")
    masked: float = Field(0.8, ge=0, le=1, description="share of these that are replaced by the mask token")
    random: float = Field(0.1, ge=0, le=1, description="share that are replaced by a random token; all others stay")

    @model_validator(mode="after")
    def _shares(self) -> MaskingRecipe:
        if self.masked + self.random > 1 + 1e-9:
            raise ValueError(f"masked {self.masked:g} and random {self.random:g} are more than all of the tokens")
        return self


class DataRecipe(StrictSettings):
    """Everything that decides which tokens are read in which order, except the seed and the row length."""

    domains: list[DomainRecipe] = Field(
        min_length=1, description="kinds of text: a list, or a mapping of names to texts"
    )
    dynamic: DynamicWeights | None = Field(
        None, description="update the weights from validation losses (left out: static)"
    )
    packing: Packing = Field(
        "best_fit",
        description="best_fit cuts only documents longer than a row; concatenate cuts at every row's end; alone: one document per row",
    )
    shuffle: str = Field("32MB", description="how much text is shuffled at a time; it is tokenised ahead, on disk")
    validation: ValidationSplit = Field(default=ValidationSplit(), description="which documents are held out")
    masking: MaskingRecipe | None = Field(
        None, description="masked language models alone: which tokens are predicted (left out: as BERT)"
    )
    end_of_text: bool = Field(True, description="close every document with the tokenizer's end-of-text token")
    broken_lines: Literal["stop", "skip"] = Field(
        "stop",
        description="what to do about rows that cannot be read: stop before the first step, or skip them and report how many",
    )
    bad_images: int = Field(
        10,
        ge=0,
        description="how many images that cannot be read when their row comes are skipped, with their examples; one more ends the run",
    )
    chat_template: str | None = Field(
        None,
        description="how conversations become text: a file with a Jinja template, or turns or chatml, two that come with upcycle; the "
        "exported model keeps it (left out: the tokenizer's own)",
    )
    cache: str | None = Field(
        None, description="folder for tokenised text (left out: upcycle/tokens in XDG_CACHE_HOME or ~/.cache)"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_domain(cls, content: Any) -> Any:
        """Let ``data: demo``, or a list of files, stand for one domain."""
        return written_out(content)

    @field_validator("domains", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return [
            {"name": name, **part} if isinstance(part, dict) else {"name": name, "text": part}
            for name, part in value.items()
        ]

    @field_validator("shuffle")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataRecipe:
        names = [domain.name for domain in self.domains]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"domains: two are called '{twice[0]}'; give each its own name")
        given = [domain.weight for domain in self.domains if domain.weight is not None]
        if given and len(given) < len(names):
            missing = next(domain.name for domain in self.domains if domain.weight is None)
            raise ValueError(f"domains: '{missing}' has no weight, but others have; give all a weight, or none")
        if given and not math.isclose(sum(given), 1, abs_tol=1e-6):
            shares = ", ".join(f"{name} {weight / sum(given):.6g}" for name, weight in zip(names, given, strict=True))
            raise ValueError(
                f"domains: the weights sum to {sum(given):.6g}, not to 1; the same ratios would be {shares}"
            )
        if self.dynamic and len(names) < 2:
            raise ValueError("dynamic weights need at least two domains")
        unseen = [domain.name for domain in self.domains if domain.validation is None and not self.validation.fraction]
        if self.dynamic and unseen:
            raise ValueError(
                f"dynamic weights follow validation losses, and '{unseen[0]}' has none, because validation.fraction is 0"
            )
        if self.dynamic and self.dynamic.reference is not None and set(self.dynamic.reference) != set(names):
            different = sorted(set(self.dynamic.reference) ^ set(names))
            raise ValueError(f"dynamic.reference must name exactly the domains; it differs in {', '.join(different)}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The initial share of each domain; all sum to 1."""
        total = sum(domain.weight or 1.0 for domain in self.domains)
        return {domain.name: (domain.weight or 1.0) / total for domain in self.domains}


def written_out(content: Any) -> Any:
    """The ``data`` key in its long form: texts alone become one domain, and each domain a mapping by its name."""
    if isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, str) for part in content)):
        return {"domains": {"text": {"text": content}}}
    domains = content.get("domains") if isinstance(content, dict) else None
    if not isinstance(domains, dict):
        return content
    return {
        **content,
        "domains": {name: part if isinstance(part, dict) else {"text": part} for name, part in domains.items()},
    }
