"""The model card: what it says, what it keeps, and that nothing in a name gets out of its place."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import upcycle
from upcycle.errors import CheckpointError, UsageError
from upcycle.files import records
from upcycle.files.card_section import BEGIN, END, own_section
from upcycle.publishing.card_facts import public_name


@pytest.fixture
def split(converted: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a sparse split that was calibrated."""
    calibration = {"text": "demo", "tokens": 512, "window": 64}
    made = converted("split", method="random_split", experts=4, top_k=2, calibration=calibration)
    return Path(shutil.copytree(made, tmp_path / "split"))


def change(folder: Path, **changes: Any) -> None:
    """Let ``upcycle.json`` say something else, and the verification be about it."""
    record = records.read_record(folder)
    verification = records.read_verification(folder)
    (folder / "upcycle.json").write_text(json.dumps(record | changes))
    if verification:
        records.write_verification(folder, verification)


def card_of(folder: Path, **options: Any) -> ModelCard:
    return ModelCard.load(upcycle.write_card(folder, **options))


def test_metadata(split: Path) -> None:
    change(
        split, source=records.read_record(split)["source"] | {"name": "org/dense", "revision": "abc", "license": None}
    )
    data = card_of(split, name="alice/half", license="mit").data.to_dict()
    assert {
        key: data[key] for key in ("license", "base_model", "base_model_relation", "library_name", "pipeline_tag")
    } == {
        "license": "mit",
        "base_model": "org/dense",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert data["tags"] == ["moe", "upcycled", "upcycle", records.read_record(split)["plan"]["target"], "random_split"]
    (index,) = data["model-index"]
    assert index["name"] == "alice/half"
    measured = json.loads((split / "verification.json").read_text())
    (result,) = index["results"]
    assert result["metrics"][0] == {"type": "perplexity", "name": "Perplexity", "value": measured["perplexity"]}
    assert result["dataset"]["args"] == {"tokens": measured["tokens"]}


def test_numbers_are_the_records(split: Path) -> None:
    text = card_of(split).text
    plan = records.read_record(split)["plan"]
    measured = json.loads((split / "verification.json").read_text())
    assert f"| parameters | {plan['parameters_dense']:,} | {plan['parameters_total']:,} |" in text
    assert f"| FLOPs per token | {plan['flops_per_token_dense']:,} | {plan['flops_per_token']:,} |" in text
    assert f"| {measured['perplexity_dense']:.3f} | {measured['perplexity']:.3f} |" in text
    assert f"relative error of the logits: {measured['relative_logit_error']:.1e}" in text
    assert "4 routed experts each, of which 2 routed run per token" in text
    assert "https://arxiv.org/abs/2406.16554" in text
    assert (split / "recipe.yaml").read_text().strip() in text
    for heading in ("Method", "Before and after", "Verification", "How to load", "How to make it again", "Limits"):
        assert f"\n## {heading}\n" in text
    assert "calibrated on: `demo`" in text


def test_engines_that_were_not_tested_are_said_to_be(split: Path) -> None:
    rows = dict(re.findall(r"^\| (\S+) \|.*\| (.*) \|$", card_of(split).text, re.MULTILINE))
    assert rows["transformers"].startswith("yes, ")
    assert rows["vLLM"] == rows["SGLang"] == rows["llama.cpp"] == "no"
    (split / "verification.json").unlink()
    text = card_of(split).text
    assert "| transformers | as above | no |" in text
    assert "**Skipped.**" in text
    assert "Its quality was not measured." in text


def test_what_kind_of_result_it_is(converted: Callable[..., Path], pico: Callable[[str], Path], tmp_path: Path) -> None:
    exact = shutil.copytree(converted("moe", experts=2, max_shard_size="400KB"), tmp_path / "exact")
    text = card_of(exact).text
    assert "**Exact.**" in text
    assert "it computes what the dense model computes" in text
    upcycle.convert(str(pico("llama")), tmp_path / "deep", method="depth_stack", verification={"tokens": 64})
    card = card_of(tmp_path / "deep")
    assert card.data.tags == ["upcycled", "upcycle", "llama", "depth_stack"]
    assert "A larger model made from" in card.text
    assert "bit for bit" in card.text
    change(
        exact,
        training={"step": 7, "tokens": 1024, "loss": 2.0, "recipe": {"data": {"domains": [{"text": ["org/web:en"]}]}}},
    )
    card = card_of(exact)
    assert "trained for 7 steps on 1,024 tokens" in card.text
    assert card.data.datasets == ["org/web"]


def test_the_same_records_give_the_same_card_and_the_users_section_stays(split: Path) -> None:
    path = upcycle.write_card(split)
    first = path.read_text()
    assert upcycle.write_card(split).read_text() == first
    mine = "## Mine\r\n\r\n| a | b |\n---\nfree *text*, <b>even this</b>\n"
    path.write_text(
        first.replace(f"{BEGIN}\n", f"{BEGIN}\n{mine}", 1).replace("Random split", "Edited by hand"), newline=""
    )
    again = upcycle.write_card(split, name="other").read_text()
    assert own_section(again, "") == "\n".join(mine.splitlines()) + "\n"
    assert "Edited by hand" not in again
    assert again.startswith("---\n")
    assert upcycle.write_card(split, name="other").read_text() == again


def test_a_card_that_is_not_ours_is_not_lost(split: Path) -> None:
    (split / "README.md").write_text("# Months of work\n")
    with pytest.raises(UsageError, match=r"README.md was not written by upcycle") as caught:
        upcycle.write_card(split)
    assert "between the two marked lines" in (caught.value.hint or "")
    assert (split / "README.md").read_text() == "# Months of work\n"


@pytest.mark.parametrize("lines", [[BEGIN], [END], [END, BEGIN], [BEGIN, BEGIN, END], [BEGIN, END, END]])
def test_marked_lines_that_are_damaged(lines: list[str]) -> None:
    with pytest.raises(UsageError, match="each once"):
        own_section("\n".join(lines), "README.md")


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no upcycle.json"):
        upcycle.write_card(tmp_path)


def test_names_stay_names(split: Path) -> None:
    evil = "x`](http://evil)|<script>alert(1)</script>\n\n# Owned\n" + END
    record = records.read_record(split)
    change(
        split,
        source=record["source"] | {"name": evil},
        calibration=record["calibration"] | {"text": [evil]},
        method=record["method"] | {"title": evil},
    )
    recipe = yaml.safe_load((split / "recipe.yaml").read_text()) | {"source": "```\n" + END + "\n# Owned"}
    (split / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = card_of(split, name=evil).content
    own_section(text, "README.md")
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text.split("\n---\n", 1)[1], flags=re.MULTILINE | re.DOTALL)
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", outside)
    assert "<script" not in outside
    assert "](http://evil)" not in outside
    assert not re.search("^# Owned", outside, re.MULTILINE)
    rows = re.findall(r"^\|.*\|$", outside, re.MULTILINE)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_licences_of_the_sources(split: Path) -> None:
    apache, mit = ({"id": name, "name": None, "link": None} for name in ("apache-2.0", "mit"))
    base = records.read_record(split)["source"] | {"name": "org/a", "revision": "1", "license": apache}

    def mixed(license: Any) -> None:
        change(split, source=base, sources=[{**base, "name": "org/b", "license": license}])

    mixed(apache)
    data = card_of(split).data
    assert data.license == "apache-2.0"
    assert (data.base_model, data.base_model_relation) == (["org/a", "org/b"], "merge")
    (split / "README.md").unlink()
    for license, words in ((mit, "org/a: apache-2.0, org/b: mit"), (None, "org/a: apache-2.0, org/b: unknown")):
        mixed(license)
        with pytest.raises(UsageError, match=words) as caught:
            upcycle.write_card(split)
        assert "--license ID" in (caught.value.hint or "")
        assert not (split / "README.md").exists()
    assert card_of(split, license="mit").data.license == "mit"
    assert card_of(split).data.license == "mit"  # decided once


def test_what_only_the_user_knows_is_kept(split: Path) -> None:
    with pytest.raises(UsageError, match=r"takes a hub id, got './dense'"):
        upcycle.write_card(split, base_model="./dense")
    assert card_of(split).data.base_model is None
    assert card_of(split, base_model="org/dense", license="mit").data.base_model == "org/dense"
    data = card_of(split).data
    assert (data.base_model, data.license) == ("org/dense", "mit")


def test_folders_of_this_machine_are_no_names(split: Path, pico: Callable[[str], Path]) -> None:
    text = card_of(split).content.split("<details>")[0]
    assert str(pico("llama").parent) not in text
    names = {"/home/me/llama": "llama", "~/x": "x", "./x/y": "y", "a/b/c": "c", "org/name": "org/name", "demo": "demo"}
    assert {name: public_name(name) for name in names} == names


def test_links_lead_to_papers_alone(split: Path) -> None:
    """Whatever a record says: the rendered card has no link but to web addresses, and no bare address for a renderer to link."""
    from markdown_it import MarkdownIt

    paper = "https://arxiv.org/abs/2212.05055"
    hostile = [
        "javascript:alert(1)",
        "data:text/html,x",
        "https://a.example/>) [x](javascript:a",
        "//evil.example",
        "ftp://e.x",
    ]
    title = "see https://evil.example/a_b, www.evil.example, me@evil.example and HTTP://EVIL.example"
    for address in (paper, f"{paper}, {hostile[0]}", *hostile):
        change(split, router={"name": title, "title": title, "paper": address}, method=None)
        change(split, method={"name": "m", "title": title, "paper": address})
        text = card_of(split, name=title).content.split("\n---\n", 1)[1]
        tokens = [token for block in MarkdownIt("commonmark").parse(text) for token in (block, *(block.children or []))]
        found = {str(token.attrs["href"]) for token in tokens if token.type == "link_open"}
        assert found == ({paper} if paper in address else set())
        links = depth = 0
        for token in tokens:  # GFM makes links of bare addresses in text, not in code nor in a link
            depth += {"link_open": 1, "link_close": -1}.get(token.type, 0)
            if token.type == "text" and not depth:
                links += len(re.findall(r"(?i)https?://|www\.|ftp://|\w@\w", token.content))
        assert links == 0


def test_what_was_decided_stays_decided_where_the_source_has_a_licence(split: Path) -> None:
    base = records.read_record(split)["source"]
    change(split, source=base | {"license": {"id": "mit", "name": None, "link": None}})
    assert card_of(split).data.license == "mit"
    assert card_of(split, license="llama3.1").data.license == "llama3.1"
    data = card_of(split).data
    assert data.license == "llama3.1"
    terms = {"license": "other", "license_name": "Ours", "license_link": "https://a.example/terms"}
    card_of(split, **terms)
    assert {key: card_of(split).data.to_dict()[key] for key in terms} == terms
    with pytest.raises(UsageError, match="not a licence that the hub knows"):
        upcycle.write_card(split, license="whatever")
