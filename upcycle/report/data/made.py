"""Reads what was done: the recipe, the method with its paper, and the layers that resulted."""

from __future__ import annotations

from typing import Any

from upcycle.files import records
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.planning.compress_job import cut_reports
from upcycle.report.data.structure import layer_structure
from upcycle.report.data.subject import Subject, missing


def made_data(subject: Subject) -> dict[str, Any]:
    """Return recipe, method, router, calibration and the plan's warnings, with ``layers`` as :func:`layer_structure` gives them."""
    if subject.config is None:
        return _unfinished(subject)
    layers = layer_structure(subject)
    record = subject.record
    common = {"architecture": subject.config.get("model_type"), "layers": layers}
    if record is None:
        return {**common, "note": "this model was not written by upcycle: how it was made is not known"}
    recipe = subject.folder / records.RECIPE_FILE
    return {
        **common,
        "method": record["method"],
        "router": record.get("router"),
        "source": record["source"]["name"],
        "sources": [source["name"] for source in record.get("sources") or []],
        "target": record.get("target", record["source"]["family"]),
        "scale": record.get("scale"),
        "refit": record.get("refit"),
        "calibration": record.get("calibration"),
        "kind": record["plan"]["kind"],
        "summary": record["plan"].get("summary", ""),
        "promise": record["plan"]["promise"],
        "promise_reason": record["plan"]["promise_reason"],
        **({"cuts": _cuts(subject)} if record["plan"]["kind"] == "compression" else {}),
        "warnings": record["plan"]["warnings"],
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    }


def _cuts(subject: Subject) -> list[dict[str, Any]]:
    """Return, for every layer of a compressed MoE, the source's experts that each of its experts is made of, and the refit.

    Of a dense model made of a MoE: the experts of each part of its FFN, and under ``neurons`` how many of them that has (None: all).
    """
    return [
        {"layer": found["layer"], **_made_of(found), **(found["refit"] or {})} for found in cut_reports(subject.folder)
    ]


def _made_of(found: dict[str, Any]) -> dict[str, Any]:
    if "kept" in found:
        return {"experts": [], "kept": found["kept"]}
    if "parts" not in found:
        return {"experts": [[term["expert"] for term in terms] for terms in found["experts"]]}
    parts = found["parts"]
    orders = [part["terms"][0]["order"] for part in parts]
    return {
        "experts": [[term["expert"] for term in part["terms"]] for part in parts],
        "neurons": [
            part["rank"] or (None if order is None else len(order)) for part, order in zip(parts, orders, strict=True)
        ],
    }


def _unfinished(subject: Subject) -> dict[str, Any]:
    decided = sorted((subject.folder / LAYER_BLUEPRINTS).glob("*.safetensors"))
    journal = subject.folder / "journal.jsonl"
    written = len(journal.read_text(encoding="utf-8").splitlines()) if journal.is_file() else 0
    if subject.log and not decided and not written:
        return missing("the training run has not exported a model yet")
    done = f"{len(decided)} layers are decided and {written} units are written"
    return missing(f"the conversion is not finished: {done}; to continue it, run the same command again")
