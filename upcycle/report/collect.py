"""Collects a report's data section by section; a section that cannot be filled says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.architectures.stock_auto import is_encoder, is_encoder_decoder, reads_of
from upcycle.errors import UpcycleError
from upcycle.files import private_text
from upcycle.files.local_names import records_without_folders
from upcycle.progress import SILENT, Progress
from upcycle.report.data.compared import comparison_data
from upcycle.report.data.cost import cost_data
from upcycle.report.data.evaluated import speed_data, tasks_data
from upcycle.report.data.exactness import exactness_data
from upcycle.report.data.made import made_data
from upcycle.report.data.provenance import provenance_data
from upcycle.report.data.subject import Subject, find_subject, missing, reason_of
from upcycle.report.data.summary import summary_data
from upcycle.report.data.training import training_data
from upcycle.verification.verdict import json_numbers
from upcycle.version import __version__

PROMPTS = ("def read_file(path):\n    ", "The most important thing about ")
SECTIONS = (
    *("made", "cost", "speed", "exactness", "quality", "tasks", "routing", "experts", "training", "comparison"),
    "provenance",
)


@dataclass(frozen=True)
class Wanted:
    """Says what a report measures.

    Attributes:
        texts: UTF-8 files or names of embedded texts; default: all embedded texts.
        tokens: most tokens to read of each text.
        prompts: texts that the models continue.
        source: the dense parent, where the recipe does not lead to it.
        compare: a file that ``upcycle compare --out`` wrote.
        training: the folder or log of a training run, where the model is not in it.
        run: False only reads files and runs no model.
        images: a folder of images, for encoders that read them.
        calibrations: records of what other models were calibrated on, beside which this one is shown: that is not read, either.
    """

    texts: Sequence[str] = ()
    tokens: int = 2048
    prompts: Sequence[str] = PROMPTS
    source: str | None = None
    compare: Path | None = None
    training: Path | None = None
    run: bool = True
    images: str | None = None
    calibrations: Sequence[Mapping[str, Any]] = ()


def collect(name: str, wanted: Wanted, progress: Progress = SILENT) -> tuple[Subject, dict[str, Any]]:
    """Return the model that ``name`` means and, as plain data, everything that a report says about it.

    A section that cannot be filled is ``{"missing": reason}``.

    Raises:
        UsageError: there is no model of that name, a text cannot be read, or there is no such training log.
        CheckpointError: the named comparison is missing, or is not one.
    """
    subject = find_subject(name, wanted.training)
    with progress.phase("reading files", len(_READERS)):
        sections = {}
        for section, data in _READERS.items():
            sections[section] = _or_reason(lambda data=data: data(subject))  # type: ignore[misc]
            progress.advance()
    sections["comparison"] = comparison_data(subject, wanted.compare)
    sections |= _measured(subject, wanted, progress)
    summary = summary_data(subject, sections)
    ordered = {section: sections[section] for section in SECTIONS}
    return subject, _public({"out": subject.name, "upcycle": __version__, "summary": summary, **ordered})


def _public(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data without the folders of this machine; what models wrote and read stays as it is."""
    written = data["quality"].get("samples")
    found: dict[str, Any] = records_without_folders({key: part for key, part in data.items() if key != "routing"})
    if written is not None:
        found["quality"]["samples"] = written
    reason = data["routing"].get("missing")
    return {key: found.get(key, data[key]) for key in data} | (
        {"routing": missing(private_text.text_without_folders(reason))} if reason else {}
    )


_READERS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "made": made_data,
    "cost": cost_data,
    "exactness": exactness_data,
    "tasks": tasks_data,
    "speed": speed_data,
    "training": training_data,
    "provenance": provenance_data,
}


def _or_reason(data: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return data()
    except UpcycleError as error:
        return missing(reason_of(error))


def _measured(subject: Subject, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    """Return the sections for which the models must run: quality, routing and experts."""
    why = None
    if subject.config is None:
        why = "the model is not complete"
    elif not wanted.run:
        why = "the model was not run (--no-run)"
    elif is_encoder(subject.config):
        why = "an encoder predicts no text, by which this is measured (upcycle evaluate measures it by what it is for)"
        rest = {section: missing(why) for section in ("quality", "experts")}
        if reads_of(subject.config) not in ("text", "images"):
            return {**rest, "routing": missing("its routers are only measured on texts or images alone")}
        return {**rest, "routing": _or_reason(lambda: _encoder_routing(subject, wanted, progress))}
    elif is_encoder_decoder(subject.config):
        why = "a model of an encoder and a decoder reads pairs, and quality and routing are measured on single texts"
    elif wanted.texts:
        from upcycle.text.reading.plain_text import read_text

        for text in wanted.texts:
            read_text(text)  # the user named this text, so a fault in it is an error and not a missing section
    if why is None:
        try:
            return _run(subject, wanted, progress)
        except UpcycleError as error:
            why = reason_of(error)
    return {section: missing(why) for section in ("quality", "routing", "experts")}


def _encoder_routing(subject: Subject, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    from upcycle.report.data.encoder_routing import encoder_routing

    found: dict[str, Any] = json_numbers(encoder_routing(subject, wanted.texts, wanted.tokens, wanted.images, progress))
    return found


def _run(subject: Subject, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    from upcycle.report.data.experts import experts_data
    from upcycle.report.data.models import load_models
    from upcycle.report.data.quality import quality_data
    from upcycle.report.data.routing import routing_data
    from upcycle.report.data.run_models import run_models, write_samples
    from upcycle.report.data.texts import read_domains

    with progress.phase("loading models", 1):
        tokenizer, domains = read_domains(subject, wanted.texts, wanted.tokens, wanted.calibrations)
        models = load_models(subject, wanted.source)
        progress.advance()
    measured = run_models(models, domains, progress)
    compared = models.reference is not None
    quality = {
        "names": subject.sides,
        **quality_data(measured.totals, compared),
        "remarks": {domain.name: domain.remark for domain in domains if domain.remark},
        "no_reference": models.no_reference,
        "samples": write_samples(models, tokenizer, wanted.prompts),
    }
    if measured.choices is None:
        reason = "no layer has a router" if not subject.moe_layers else str(measured.no_routing)
        return {"quality": quality, "routing": missing(reason), "experts": missing(reason)}
    rows = {layer.index: next(layer.router.parameters()) for layer in measured.layers}
    routing = json_numbers(routing_data(measured.choices, rows, lambda token: str(tokenizer.decode([token]))))
    return {"quality": quality, "routing": routing, "experts": json_numbers(experts_data(models, measured, progress))}
