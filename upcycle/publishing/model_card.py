"""Writes the model card, ``README.md``, from ``upcycle.json``, ``recipe.yaml`` and ``verification.json``.

When it is written again, text between two marked lines is kept, and so are a licence and a base model that the user named and no
record has. Format: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.licenses import License, chosen_license, front_matter
from upcycle.errors import UsageError
from upcycle.files import records
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.card_section import BEGIN, END, own_section
from upcycle.files.user_paths import user_path
from upcycle.publishing.card_facts import Facts, gather, public_name
from upcycle.publishing.card_text import body

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData


def write_card(
    out: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write ``README.md`` into a folder that :func:`upcycle.convert` wrote, and return its path; the user's section is kept.

    Args:
        out: the converted model.
        name: the model's name on the card; default: the folder's name.
        license: the hub's id of the licence, if it does not follow from the sources; kept when the card is written again.
        license_name, license_link: name of an ``other`` licence, and where its text is (an address, or a file of the model).
        base_model: the hub id of the dense model, if a local folder was converted.

    Raises:
        CheckpointError: upcycle did not write the folder.
        UsageError: the sources' licences differ, the hub does not know the licence, or upcycle did not write the present card.
    """
    chosen = chosen_license(license, license_name, license_link)
    folder = user_path(out)
    text = make_card(folder, name or folder.absolute().name, license=chosen, base_model=base_model)
    return write_text_whole(folder / records.CARD_FILE, text)


def make_card(
    folder: Path,
    name: str,
    *,
    license: License | None = None,
    base_model: str | None = None,
    mark: str | None = None,
    published: str = "",
) -> str:
    """Return the text of a card; see :func:`write_card`.

    Args:
        folder: the converted model.
        name: the model's name on the card.
        license: the licence that the user named, if any.
        base_model: the hub id of the dense model that the user named, if any.
        mark: why the model should not be relied on, shown at the top.
        published: the card on the hub, whose user's section is used where the local card has none.
    """
    path = folder / records.CARD_FILE
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    own = own_section(before, str(path))
    if before and own is None:
        raise UsageError(
            f"{path} was not written by upcycle, and would be lost",
            hint=f"move it away, run upcycle card {folder}, and put your text between the two marked lines of the new one",
        )
    if not (own or "").strip():
        own = own_section(published, "the card on the hub") or own
    kept = front_matter(before)
    facts = gather(folder, name, license, base_model, kept, mark)
    return _joined(facts, own or "", {"language": kept["language"]} if "language" in kept else {})


def _joined(facts: Facts, own: str, kept: dict[str, Any]) -> str:
    from huggingface_hub import ModelCard

    text = body(facts, f"{BEGIN}\n{own}\n{END}")
    return str(ModelCard(f"---\n{_metadata(facts, kept).to_yaml()}\n---\n\n{text}\n"))


def _metadata(facts: Facts, kept: dict[str, Any]) -> ModelCardData:
    from huggingface_hub import ModelCardData

    record, license, results = facts.record, facts.license, _results(facts)
    tags = [*(["moe"] if facts.moe else []), "upcycled", "upcycle", record["plan"]["target"], record["method"]["name"]]
    return ModelCardData(
        base_model=facts.base_models[0] if len(facts.base_models) == 1 else facts.base_models or None,
        # The hub knows adapter, finetune, merge and quantized; "finetune" is nearest to a model made from another's weights.
        base_model_relation=("merge" if facts.mixed else "finetune") if facts.base_models else None,
        datasets=facts.datasets or None,
        eval_results=results or None,
        model_name=facts.name if results else None,
        library_name="upcycle" if facts.own_class else "transformers",
        license=license.id if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        pipeline_tag=facts.loading.task,
        tags=tags,
        **kept,
    )


def _results(facts: Facts) -> list[EvalResult]:
    """Return what was measured, for the hub's ``model-index``."""
    measured, tasks = facts.verification, facts.tasks
    results = []
    if measured and measured["perplexity"] is not None:
        text = public_name(measured["text"])
        arguments = {"tokens": measured["tokens"]}
        results.append(_result(text, arguments, "perplexity", "Perplexity", measured["perplexity"]))
    for score in tasks["scores"] if tasks else []:
        arguments = {"questions": score["samples"], "harness": tasks["harness"]} if tasks else {}
        results.append(_result(score["task"], arguments, score["metric"], score["metric"], score["value"]))
    return results


def _result(dataset: str, arguments: dict[str, Any], kind: str, name: str, value: float) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=re.sub(r"[^\w.-]+", "-", dataset).strip("-").lower(),
        dataset_name=dataset,
        dataset_args=arguments,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )
