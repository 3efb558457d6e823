"""Explains the terms that a reader may not know, where they stand."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

TERMS = {
    "MaxVio": "the largest load of an expert divided by the mean load, minus 1: 0 is perfect balance, 1 is twice the share",
    "perplexity": "how many equally likely next tokens the model hesitates between, in the mean; lower is better",
    "KL": "Kullback-Leibler divergence of the parent's next-token probabilities from the model's, in nats; 0 is the same",
    "FLOPs": "floating-point operations; a product and a sum are two",
    "entropy": "how evenly tokens are spread over experts: 1 is even, 0 is one expert",
    "cosine": "of the angle between two vectors: 1 is the same direction, 0 is nothing in common",
    "SHA-256": "a fingerprint of a file: another content has another one",
    "refit": "projections solved for again, so that the layer's output is nearer to what it was",
    "router": "the small matrix that scores the experts for every token",
    "active": "what runs for one token",
}
_FOUND = re.compile(r"\b(" + "|".join(map(re.escape, sorted(TERMS, key=len, reverse=True))) + r")\b")


def explained(text: object) -> Markup:
    """Return a text with the first of its terms underlined, and its explanation shown when it is pointed at."""
    plain = str(escape(text))
    return Markup(
        _FOUND.sub(lambda found: f'<abbr title="{escape(TERMS[found[1]])}">{found[1]}</abbr>', plain, count=1)
    )


def typed(command: str) -> Markup:
    """Return a command that is broken between its words only: a browser breaks at hyphens, and ``--`` of an option is left behind."""
    return Markup("<code>{}</code>").format(
        Markup(" ").join(Markup("<span>{}</span>").format(word) for word in command.split())
    )
