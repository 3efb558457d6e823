"""How terms and commands are marked up."""

from __future__ import annotations

from upcycle.report.sections.terms import explained, typed


def test_a_command_is_broken_between_its_words_only() -> None:
    assert typed("upcycle push <out> --dry-run") == (
        "<code><span>upcycle</span> <span>push</span> <span>&lt;out&gt;</span> <span>--dry-run</span></code>"
    )


def test_the_first_term_is_explained_and_nothing_is_markup() -> None:
    found = explained("a <b> of MaxVio and KL")
    assert found.startswith('a &lt;b&gt; of <abbr title="the largest load')
    assert found.endswith(">MaxVio</abbr> and KL")
