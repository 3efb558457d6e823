"""Answers what somebody asks of a report first: may I use this model, is it faster, what do I type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.report.data.subject import Subject
from upcycle.verification.verdict import unseen_ratio

_LITTLE = 1.02  # ratio of perplexity below which a loss is hardly noticed
CLOSE = 1.1  # ... up to which little is lost
_KERNELS = {"grouped_mm": "transformers' kernels", "upcycle": "upcycle's"}


def answers(
    subject: Subject, verdict: str, problems: Sequence[str], sections: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return the first questions and their answers, each a ``question``, a ``text`` and a ``command`` (or nothing).

    What was not measured is said to be unknown, with the command that measures it.

    Args:
        subject: the model.
        verdict: of its verification.
        problems: the texts of findings for which it must not be used.
        sections: of the report, by name.
    """
    text, command = _next(subject, verdict, problems, sections)
    speed = sections["speed"]
    if verdict == "dense":
        command = f"upcycle plan {subject.name} --experts 8"
        return [
            {"question": "May I use it?", "text": _use(verdict, problems, sections), "command": ""},
            {"question": "What next?", "text": "See what converting it would cost:", "command": command},
        ]
    measure = "" if speed.get("reference") else f"upcycle evaluate {subject.name} --reference PARENT --speed"
    return [
        {"question": "May I use it?", "text": _use(verdict, problems, sections), "command": ""},
        {"question": "Is it faster?", "text": _speed(subject, speed), "command": measure},
        {"question": "What next?", "text": text, "command": command},
    ]


def _use(verdict: str, problems: Sequence[str], sections: Mapping[str, Any]) -> str:
    if verdict == "unfinished":
        return "Not yet: it is not complete."
    if verdict == "dense":
        return "It is as it was published: upcycle did not make it, so there is nothing to compare it with."
    if problems:
        return f"No: {problems[0]}."
    loss, trained = _loss(sections), bool(sections["provenance"].get("trained"))
    if verdict == "exact" and not trained:
        return "Yes, wherever its dense parent is used: it computes the same."
    if loss is None:
        return "Not known: it was not compared with its parent on text."
    known = flattering(sections["quality"])
    text = "text that it was partly calibrated on, which flatters it," if known else "the text that was read,"
    word = "Yes" if loss <= _LITTLE and not known else "With care" if loss <= CLOSE else "Not as it is, but trained"
    said = f"{word}: on {text} perplexity is {loss:.3f}x its parent's"
    verification = sections["exactness"].get("verification")
    unseen = unseen_ratio(verification) if verification and not trained else None
    if unseen is not None:
        said += f"; on a kind of text that was not calibrated on, {unseen:.2f}x"
    return said + ". Measure it on text of yours before you rely on it."


def flattering(quality: Mapping[str, Any]) -> list[str]:
    """Return the texts that the model was calibrated on, which make it look better than it is, each with how much of it."""
    remarks = quality.get("remarks") or {}
    return [f"{name}: {remark}" for name, remark in remarks.items() if "calibrated on" in remark]


def _loss(sections: Mapping[str, Any]) -> float | None:
    """Return the ratio of perplexities that was measured for the report or, where no model was run, at verification."""
    ratio = sections["quality"].get("ratio")
    if ratio is not None:
        return float(ratio)
    found = sections["exactness"].get("verification") or {}
    before, after = found.get("perplexity_dense"), found.get("perplexity")
    return after / before if before and after else None


def _speed(subject: Subject, speed: Mapping[str, Any]) -> str:
    if "missing" in speed:
        predicted = ((subject.record or {}).get("plan", {}).get("time") or {}).get("relative")
        if not predicted:
            return "Not known: speed was not measured."
        times_of = "; ".join(
            f"with {_KERNELS.get(kernels, kernels)} {times['prefill']:.2f}x the time to read and {times['decode']:.2f}x to write"
            for kernels, times in predicted.items()
        )
        return f"Predicted, relative to its parent: {times_of}. Not measured."
    if not speed.get("reference") or speed.get("prefill_ratio") is None:
        return "Not known: its parent was not timed beside it."
    ways = [("with transformers' kernels", speed["prefill_ratio"], speed["decode_ratio"])]
    if kernels := speed.get("kernels"):
        ways.append(("with upcycle's", kernels["prefill_ratio"], kernels["decode_ratio"]))
    told = "; ".join(
        f"{how} it reads {read:.2f}x and writes {write:.2f}x as many tokens per second" for how, read, write in ways
    )
    best = max(min(read, write) for _, read, write in ways)
    word = "Yes" if best > 1.03 else "No" if max(max(read, write) for _, read, write in ways) < 1.03 else "In part"
    return f"{word}: {told} ({speed['device']}, {speed['dtype']})."


def _next(subject: Subject, verdict: str, problems: Sequence[str], sections: Mapping[str, Any]) -> tuple[str, str]:
    """Return what to do next, and its command."""
    name, kind = subject.name, str(subject.record["plan"]["kind"]) if subject.record else ""
    by_verdict = {
        "broken": ("Do not use it. Please report it, with what this prints:", "upcycle env"),
        "unfinished": ("Run the same command again: it continues.", ""),
    }
    if verdict in by_verdict:
        return by_verdict[verdict]
    if subject.ours and (problems or verdict == "unverified"):
        why = "Find out what is left of it:" if problems else "Compare it with its parent, which publishing asks for:"
        return why, f"upcycle verify {name}"
    if sections["provenance"].get("trained"):
        return "If that is good enough, publish it:", f"upcycle push {name} YOU/NAME --dry-run"
    if verdict == "exact" and kind == "copies":
        return (
            "Train it, as copies gain nothing before:",
            f"upcycle train upcycle_cpt --model {name} --output RUN --set data=TEXT",
        )
    if kind in ("partition", "overlap"):
        return "Win quality back:", f"upcycle train heal_distill --model {name} --output RUN --set data=TEXT"
    return "Measure it on text of yours:", f"upcycle evaluate {name} --reference PARENT --text YOURS.txt"
