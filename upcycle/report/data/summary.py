"""Sums up a report: the verdict, and the findings that a reader should see first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from upcycle.report.data.answers import CLOSE, answers, flattering
from upcycle.report.data.subject import Subject
from upcycle.verification.verdict import overfitted, unseen_ratio

Level = Literal["good", "caution", "bad"]
_SAME = 1.001  # ratio of perplexity up to which nothing is lost
_OVERLOAD = 1.0  # MaxVio at which an expert gets twice its share
_ALIKE = 0.9  # cosine (26 degrees) from which on two router rows nearly always choose together


def summary_data(subject: Subject, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``verdict`` of the verification (or ``dense``, ``unverified``, ``unfinished``), its ``explanation``, and more.

    Each of the ``findings`` has a ``level`` and a ``text``; the worst come first. The ``answers`` are those of
    :func:`upcycle.report.data.answers.answers`.
    """
    verification = sections["exactness"].get("verification")
    verdict = verification["verdict"] if verification else "dense" if subject.dense else "unverified"
    if subject.state == "unfinished":
        verdict = "unfinished"
    findings: list[dict[str, str]] = []

    def say(level: Level, text: str) -> None:
        findings.append({"level": level, "text": text})

    _say_state(subject, sections, verification, say)
    _say_quality(sections["quality"], say)
    _say_routing(sections["routing"], say)
    training = sections["training"]
    if alarms := training.get("alarms"):
        say("caution", f"training raised {len(alarms)} alarms; the last: {alarms[-1]['message']}")
    if skipped := training.get("skipped_steps"):
        say("caution", f"training skipped {skipped} steps whose loss or gradient was not finite")
    findings.sort(key=lambda finding: ("bad", "caution", "good").index(finding["level"]))
    return {
        "verdict": verdict,
        "explanation": verification["explanation"] if verification else "",
        "findings": findings,
        "answers": answers(subject, verdict, [each["text"] for each in findings if each["level"] == "bad"], sections),
    }


def _say_state(subject: Subject, sections: Mapping[str, Any], verification: Any, say: Any) -> None:
    if subject.state == "failed":
        say("bad", "the conversion did not keep its promise and was set aside: do not use or publish it")
    if subject.state == "unfinished":
        say(
            "bad",
            sections["made"].get(
                "missing", "the conversion is not finished; to continue it, run the same command again"
            ),
        )
    trained = sections["provenance"].get("trained")
    if verification and trained:
        say("caution", f"verified when it was converted, but changed since by {trained['step']:,} steps of training")
    elif verification:
        level: Level = {"exact": "good", "approximate": "caution"}.get(verification["verdict"], "bad")  # type: ignore[assignment]
        say(level, f"{verification['verdict']}: {verification['explanation']}")
        if overfitted(verification):
            lost, known = unseen_ratio(verification), verification["perplexity"] / verification["perplexity_dense"]
            say(
                "caution",
                f"on everyday English, which was not calibrated on, perplexity is {lost:.2f}x the dense model's, and {known:.2f}x on "
                "what was: calibrate on all that the model will read",
            )
    elif subject.ours and subject.state == "finished":
        say("caution", "not verified: how equal it is to its dense parent is not known yet")
    elif not subject.ours and not subject.dense:
        say("caution", "not written by upcycle: how it was made is not known")
    provenance = sections["provenance"]
    if provenance.get("changed"):
        say("bad", f"files have changed since they were written: {provenance['changed']}")
    elif "files" in provenance:
        say("good", f"all {len(provenance['files'])} files are as they were written (SHA-256)")


def _say_quality(quality: Mapping[str, Any], say: Any) -> None:
    if broken := [domain["text"] for domain in quality.get("domains", ()) if domain["perplexity"] is None]:
        say("bad", f"the model's output is not finite on {', '.join(broken)}: do not use it")
    ratio = quality.get("ratio")
    if ratio is None:
        return
    text = f"perplexity is {ratio:.3f}x its parent's (geometric mean over {len(quality['domains'])} texts)"
    if flattered := flattering(quality):
        parts = "; ".join(one.partition(" was calibrated on")[0] for one in flattered)  # code: 50% of it
        say("caution", f"{text}, on text that it was calibrated on, so the numbers are too good ({parts})")
    elif ratio <= _SAME:
        say("good", text)
    else:
        much = "" if ratio <= CLOSE else ": heal it by continual pre-training before use"
        say("caution", text + much)


def _say_routing(routing: Mapping[str, Any], say: Any) -> None:
    layers = routing.get("layers")
    if not layers:
        return
    dead = sum(len(layer["dead_experts"]) for layer in layers)
    total = sum(layer["experts"] for layer in layers)
    if dead:
        say("caution", f"{dead:,} of {total:,} experts got none of the {routing['tokens']:,} tokens that were read")
    else:
        say("good", f"every one of the {total:,} experts got tokens")
    alike = [layer for layer in layers if layer["top_k"] < layer["experts"] and _closest(layer) >= _ALIKE]
    if alike:
        most = max(alike, key=_closest)
        first, second = most["router_closest"]["experts"]
        say(
            "caution",
            f"router rows are nearly the same in {len(alike)} of {len(layers)} layers (cosine {_closest(most):.2f} of experts "
            f"{first} and {second} in layer {most['layer']}): such experts are chosen together",
        )
    worst = max(layers, key=lambda layer: layer["max_violation"])
    text = f"the busiest expert of any layer has {1 + worst['max_violation']:.2f}x its share (layer {worst['layer']})"
    say("caution" if worst["max_violation"] >= _OVERLOAD else "good", text)


def _closest(layer: Mapping[str, Any]) -> float:
    """Return the largest cosine of two router rows; 0 where it is not finite."""
    found = (layer["router_closest"] or {}).get("cosine")
    return found if found is not None and math.isfinite(found) else 0.0
