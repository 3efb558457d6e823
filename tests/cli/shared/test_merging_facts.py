"""What the terminal says of merges."""

from __future__ import annotations

from upcycle.cli.shared.merging_facts import merging_facts

GLUED = {
    "sources": ["/zoo/math", "/zoo/maths", "/zoo/code", "/zoo/bad"],
    "compare": "deltas",
    "threshold": 0.5,
    "similarity": [[1, 0.9, 0, 0.8], [0.9, 1, 0, 0.7], [0, 0, 1, 0], [0.8, 0.7, 0, 1]],
    "clusters": [[0, 1, 3], [2]],
    "perplexity": [12.0, 11.0, None, 13.0],
    "steps": [
        {"cluster": 0, "source": 0, "coefficient": 0.5, "before": 11.0, "perplexity": 10.5, "kept": True},
        {"cluster": 0, "source": 3, "coefficient": 2 / 3, "before": 10.5, "perplexity": 10.9, "kept": False},
    ],
    "coefficients": [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
}


def test_of_a_zoo() -> None:
    facts = dict(merging_facts(GLUED))
    assert facts["similarity"].splitlines()[3] == "bad    0.8000  0.7000  0.0000  1.0000"
    assert facts["clusters"] == "{math, maths, bad}, {code} (cosine of deltas above 0.5)"
    assert facts["merging"].splitlines() == [
        "maths: perplexity 11.000",
        "+ 0.5 math: 10.500, merged",
        "+ 0.33 bad: 10.900, discarded as harmful",
    ]
    assert facts["experts"] == "0: 0.5 math + 0.5 maths\n1: code"


def test_nothing_to_merge_in_a_zoo_of_strangers() -> None:
    report = {**GLUED, "clusters": [[0], [1], [2], [3]], "steps": [], "coefficients": [[1.0, 0.0, 0.0, 0.0]]}
    assert "merging" not in dict(merging_facts(report))


def test_of_posteriors() -> None:
    report = {
        "sources": ["a/x", "b/x"],
        "posterior": [0.75, 0.25],
        "coefficients": [1.0, 0.0],
        "perplexity": [9.0, 12.5],
    }
    ((name, lines),) = merging_facts(report)
    assert name == "posterior"
    assert lines.splitlines() == ["a/x: 75.0% (perplexity 9.000)", "b/x: 25.0%, left out (perplexity 12.500)"]
    assert merging_facts(None) == []
