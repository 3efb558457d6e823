"""Writes the body of a model card: what the model is, what it costs, how good it is, how it was verified, how to load it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from upcycle.architectures.stock_auto import is_encoder
from upcycle.architectures.usual_keys import usual_keys
from upcycle.evaluation.score_table import score_rows
from upcycle.publishing.card_facts import Facts, public_name, sources_of
from upcycle.publishing.markdown import code, fenced, links, plain, table
from upcycle.text.reading.plain_text import SELF_WRITTEN
from upcycle.text.text_record import own_text_in
from upcycle.verification.verdict import STATES, said, span, unseen_ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_EXAMPLES = ("images", "sounds", "pairs")  # what a calibration counts, where that is no text
_VERDICTS = {
    "exact": "**Exact.** It computes the same function as the dense model, up to rounding in fp32.",
    "approximate": "**Approximate.** It is not the same function as the dense model; the numbers below say by how much it differs.",
    "broken": "**Broken.** The conversion did not keep its promise.",
}


def body(facts: Facts, own: str) -> str:
    """Return everything below the metadata; ``own`` is the user's section with its two marked lines."""
    parts = [f"# {plain(facts.name)}", *_warning(facts), _what(facts), own]
    for title, text in (
        ("Method", _method(facts)),
        ("Before and after", _comparison(facts)),
        *([("Tasks", _tasks(facts, facts.tasks))] if facts.tasks else []),
        ("Verification", _verification(facts)),
        ("How to load", _loading(facts)),
        ("How to make it again", _recipe(facts)),
        ("Limits", "\n".join(f"- {line}" for line in _limits(facts))),
    ):
        parts += [f"## {title}", text]
    version = facts.record["versions"]["upcycle"]
    parts.append(
        f"Model and card were made with upcycle {plain(version)}. Changes to this card outside the marked section are lost when it "
        "is written again."
    )
    return "\n\n".join(parts)


def _warning(facts: Facts) -> list[str]:
    return [f"> **Do not rely on this model.** {plain(facts.mark)}"] if facts.mark else []


def _what(facts: Facts) -> str:
    record, keys = facts.record, facts.keys
    names = list(dict.fromkeys(code(public_name(source["name"])) for source in sources_of(record)))
    made = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    architecture = code((facts.config.get("architectures") or [record["plan"]["target"]])[0])
    if facts.compressed and not facts.moe:
        first = (
            f"A dense model made from {made}, a Mixture-of-Experts: {plain(record['plan']['summary'])}. `compression.json` says of "
            "every layer which neurons of its experts became the feed-forward network."
        )
    elif facts.compressed:
        first = (
            f"A smaller Mixture-of-Experts model made from {made}: {plain(record['plan']['summary'])}. Experts or "
            "layers were left out or merged; `compression.json` says of every layer what is left."
        )
    elif facts.narrowed:
        first = (
            f"A smaller dense model made from {made}: {plain(record['plan']['summary'])}. `growth.json` says of every layer which "
            "neurons are left."
        )
    elif record["plan"]["kind"] == "addition":
        first = (
            f"A Mixture-of-Experts model made from {made}: {plain(record['plan']['summary'])}. Its router row was fitted to text; all "
            "other tensors are copies."
        )
    elif record["plan"]["kind"] == "beside":
        first = (
            f"A model made from {made}, whose weights it keeps: {plain(record['plan']['summary'])}. `adapted_ffns` in `config.json` "
            "says where these experts are."
        )
    elif facts.grown:
        new = "copies"
        if record["plan"]["method"] == "masked_growth":
            new = "new weights and copies of layers, which masks kept out of the function until training had unmasked them"
        first = f"A larger model made from {made}: {plain(record['plan']['summary'])}. What was added are {new}."
    elif facts.pruned:
        first = (
            f"A smaller dense model made from {made}: {plain(record['plan']['summary'])}, those that contributed most on the "
            "calibration text. All other neurons of the feed-forward networks were pruned."
        )
    else:
        before = record.get("layers") or usual_keys(facts.config).get("num_hidden_layers")
        layers = f"{len(record['moe_layers'])}{f' of {before}' if before else ''} layers"
        shared = f" and {keys['shared']} shared" if keys["shared"] else ""
        first = (
            f"A Mixture-of-Experts model made from {made}: the feed-forward networks of {layers} became {keys['experts']} "
            f"routed{shared} experts each, of which {_running(facts, shared)}."
        )
        if attention := record.get("projections"):
            first += (
                f" {attention['count']} projections of their attention became {attention['experts']} experts each, out of MLPs that "
                "imitate them."
            )
    stored = f"It is stored as stock {architecture} in safetensors, and needs no code of its own."
    if facts.own_class:
        stored = (
            f"It is stored in safetensors as {architecture}: the dense model's own class, whose feed-forward networks are experts. "
            "transformers loads it after `import upcycle.models`, and runs no code from this repository."
        )
    return f"{first} {_history(record)}\n\n{stored}"


def _running(facts: Facts, shared: str) -> str:
    """Return which experts run for a token, by the routing rule, and how much was measured to run."""
    routing = facts.record.get("routing") or {"rule": "top_k"}
    if routing["rule"] == "top_k":
        return f"{facts.keys['top_k']} routed{shared} run per token"
    always = f"the{shared.removeprefix(' and')} always, and of the routed ones " if shared else ""
    found = (
        f"{always}{plain(routing['says'])} run for a token (rule {code(routing['rule'])}, {links(routing['paper'])})"
    )
    shares = (facts.verification or {}).get("neurons_run") or []
    if not shares:
        return found
    return f"{found}: {sum(shares) / len(shares):.1%} of the dense model's neurons, in the mean over tokens and layers"


def _history(record: dict[str, Any]) -> str:
    training, adapters = record.get("training"), record.get("adapters") or []
    said = [f"It was then trained for {training['step']:,} steps on {training['tokens']:,} tokens."] if training else []
    said += [f"A LoRA adapter, {plain(entry['name'])}, was merged into its weights." for entry in adapters]
    return " ".join(said) or "It has not been trained since."


def _method(facts: Facts) -> str:
    record = facts.record
    rows = [("method", _titled(record["method"]))]
    if "router" in record:
        rows.append(("router", _titled(record["router"])))
    if record.get("refit", "none") != "none":
        how = (
            "solved in closed form"
            if record["refit"] != "blocks"
            else "solved in closed form, then trained layer by layer,"
        )
        rows.append(("refit", f"{code(record['refit'])}, {how} on the calibration text"))
    if seen := record.get("calibration"):
        own = own_text_in(seen)
        texts = ", ".join(plain(own) if text == SELF_WRITTEN else code(public_name(text)) for text in seen["text"])
        what = next((what for what in _EXAMPLES if what in seen), "tokens")
        amount = f"{seen[what]:,} {what}"
        rows.append(("calibrated on", f"{texts} ({amount})"))
    if facts.datasets:
        rows.append(("datasets", ", ".join(map(code, facts.datasets))))
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _titled(plugin: dict[str, Any]) -> str:
    paper = f", {links(plugin['paper'])}" if plugin.get("paper") else ""
    return f"{plain(plugin['title'])} ({code(plugin['name'])}){paper}"


def _comparison(facts: Facts) -> str:
    plan, measured = facts.record["plan"], facts.verification
    dense = plan["parameters_dense"]
    rows = [
        ("parameters", f"{dense:,}", f"{plan['parameters_total']:,}"),
        ("parameters used per token", "" if facts.grown else f"{dense:,}", f"{plan['parameters_active']:,}"),
        ("FLOPs per token", f"{plan['flops_per_token_dense']:,}", f"{plan['flops_per_token']:,}"),
        ("bytes of weights", f"{plan['bytes_dense']:,}", f"{plan['bytes_output']:,}"),
    ]
    if measured and measured.get("compared") != STATES:
        name = f"perplexity, {measured['tokens']:,} tokens of {code(public_name(measured['text']))}"
        rows.append((name, said(measured["perplexity_dense"], ".3f"), said(measured["perplexity"], ".3f")))
        if unseen_ratio(measured) is not None:
            other = measured["unseen"]
            name = f"perplexity, {other['tokens']:,} tokens of everyday English, which was not calibrated on"
            rows.append((name, f"{other['perplexity_dense']:.3f}", f"{other['perplexity']:.3f}"))
    return table(["", "source" if facts.grown else "dense", "this model"], rows)


def _tasks(facts: Facts, tasks: dict[str, Any]) -> str:
    columns, rows = score_rows(tasks, ("source" if facts.grown else "dense", "this model"))
    first = f", the first {tasks['limit']:,} questions of each task" if tasks["limit"] else ""
    beside = f", beside {code(public_name(tasks['reference']))}" if tasks["reference"] else ""
    escaped = [(code(task), *map(plain, rest)) for task, *rest in rows]
    return f"Scored by {plain(tasks['harness'])} in fp32{first}{beside}:\n\n{table(columns, escaped)}"


def _verification(facts: Facts) -> str:
    measured = facts.verification
    if not measured:
        return "**Skipped.** These weights were not compared with the dense model."
    source = "its source" if facts.grown else "the dense model"
    verdict = _VERDICTS[measured["verdict"]].replace("the dense model", source)
    lines = [
        f"{verdict} Why: {plain(measured['explanation'])}.",
        "",
        f"Compared with the {'source' if facts.grown else 'dense model'} in fp32 by stock transformers code, on "
        f"{measured['tokens']:,} {_unit(measured)} of {code(public_name(measured['text']))}:",
        "",
        f"- relative error of the {measured.get('compared', 'logits')}: {said(measured['relative_logit_error'], '.1e')}"
        + (f" (promised below {measured['tolerance']:.0e})" if measured["tolerance"] else ""),
    ]
    if measured.get("compared") != STATES:
        lines += [
            f"- KL divergence of the next-token distributions: {said(measured['kl'], '.1e')} nats",
            f"- same most likely token: {measured['top1_agreement']:.1%}",
        ]
    elif measured.get("cosine") is not None:
        lines.append(f"- mean cosine of the {STATES}: {said(measured['cosine'], '.4f')}")
        if other := measured.get("unseen"):
            lines.append(
                f"- on {other['tokens']:,} tokens of everyday English, which was not calibrated on: relative error "
                f"{said(other['relative_error'], '.1e')}, mean cosine {said(other['cosine'], '.4f')}"
            )
    if measured["layer_errors"]:
        lines.append(f"- relative error of single layers: {span(measured['layer_errors'])}")
    if (far := measured.get("far_error")) is not None:
        lines.append(
            f"- relative error of the logits after position {measured['positions_needed']:,}, where attention windows and scaled "
            f"positions matter: {said(far, '.1e')}"
        )
    if measured.get("media"):
        error = measured.get("media_error")
        what = plain(measured["media"])
        lines.append(
            f"- {what}" if error is None else f"- relative error of the logits of {what}: {said(error, '.1e')}"
        )
    if measured["compared_tensors"]:
        lines.append(f"- tensors equal to what they were made from, bit for bit: {measured['compared_tensors']:,}")
    if measured["all_experts_error"] is not None:
        reference, error = plain(measured["all_experts_reference"]), measured["all_experts_error"]
        lines.append(f"- with all experts on, a layer equals {reference} within {error:.1e}")
    return "\n".join([*lines, "", "`upcycle verify` repeats this; `upcycle.json` holds the SHA-256 of every file."])


def _variable(reader: str) -> str:
    """Return the usual name of a variable for what prepares a model's input."""
    return "tokenizer" if reader == "AutoTokenizer" else "processor"


def _loading(facts: Facts) -> str:
    name = facts.name
    auto, reader, _ = facts.loading
    python = (
        f"from transformers import {auto}, {reader}\n"
        + ("\nimport upcycle.models  # registers the architecture: pip install upcycle\n" if facts.own_class else "")
        + f"\n{_variable(reader)} = {reader}.from_pretrained({json.dumps(name)})\n"
        f'model = {auto}.from_pretrained({json.dumps(name)}, dtype="auto")\n'
    )
    version = facts.record["versions"]["transformers"]
    tested = f"yes, {plain(version)}: the verification above ran it" if facts.verification else "no"
    quoted = shlex.quote(name)
    rows = [
        ("transformers", "as above", tested),
    ]
    if facts.own_class:
        if not is_encoder(facts.config):
            how = f"{code('pip install --no-deps upcycle')} beside it, then {code(f'vllm serve {quoted}')}"
            rows.append(("vLLM", how, _tested(facts, "vllm")))
        note = "Other engines do not know this architecture."
        return "\n\n".join(
            [fenced(python, "python"), table(["engine", "how", "tested with this model"], rows, right=False), note]
        )
    rows += [
        ("vLLM", code(f"vllm serve {quoted}"), _tested(facts, "vllm")),
        ("SGLang", code(f"python -m sglang.launch_server --model-path {quoted}"), "no"),
        ("llama.cpp", code("python convert_hf_to_gguf.py FOLDER"), _tested(facts, "llama.cpp")),
    ]
    note = "An engine that was not tested may still support this architecture: see its documentation."
    return "\n\n".join(
        [fenced(python, "python"), table(["engine", "how", "tested with this model"], rows, right=False), note]
    )


def _tested(facts: Facts, engine: str) -> str:
    """Return what ``upcycle verify --with`` found for an engine."""
    found = facts.serving.get(engine)
    if not found:
        return "no"
    if found["verdict"] == "not held":
        return f"it cannot run this model: {plain(found['explanation'])}"
    answer = "yes" if found["verdict"] == "same" else "**do not use it**"
    return f"{answer}, {plain(found['version'])} in {plain(found['dtype'])}: {plain(found['explanation'])}"


def _recipe(facts: Facts) -> str:
    record = facts.record
    lines = ["upcycle convert recipe.yaml OUT"]
    if record.get("training"):
        lines.append("upcycle train train.yaml RUN   # its recipe is under 'training' in upcycle.json")
    pinned = [
        f"{code(public_name(source['name']))} at revision {code(source['revision'])}"
        for source in sources_of(record)
        if source.get("revision")
    ]
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    origin = [
        f"Made with {plain(used)}, seed {record['seed']}" + (f", from {', '.join(pinned)}" if pinned else "") + "."
    ]
    if not pinned:
        fingerprint = code(record["source"]["fingerprint"])
        origin.append(f"The source was not a repository of the hub; its fingerprint is {fingerprint}.")
    details = f"<details><summary>recipe.yaml</summary>\n\n{fenced(facts.recipe, 'yaml')}\n\n</details>"
    return "\n\n".join([fenced("\n".join(lines), "sh"), " ".join(origin), details])


def _unit(measured: Mapping[str, Any]) -> str:
    """Return what a verification counts: tokens, images or sounds."""
    states = measured.get("compared") == STATES
    return next((what for what in ("images", "sounds") if states and what in measured["text"]), "tokens")


def _limits(facts: Facts) -> Iterator[str]:
    record, measured = facts.record, facts.verification
    encoder = bool(measured and measured.get("compared") == STATES)
    plan, trained = record["plan"], bool(record.get("training") or record.get("adapters"))
    source = "its source" if facts.grown else "the dense model"
    yield (
        f"It knows no more than {source}, and has its biases and its terms of use."
        if not trained
        else f"It keeps the biases of {source} where training did not change them, and its terms of use."
    )
    if not trained and plan["promise"] == "approximate":
        worse = "its answers are worse than those of" if encoder else "it writes worse text than"
        starting = "" if facts.compressed else "It is a starting point for training: as it is, "
        yield f"{starting}{worse if starting else worse[0].upper() + worse[1:]} the model that it was made from."
    if not trained and plan["promise"] != "approximate" and not facts.compressed:
        yield "It is a starting point for training: as it is, it computes what the dense model computes, and nothing is gained."
    ratio = plan["flops_per_token"] / plan["flops_per_token_dense"]
    yield f"A token costs {ratio:.2f} times the FLOPs that it costs in {source}, and all parameters must be in memory."
    if record.get("calibration") and not trained:
        what = next((what for what in _EXAMPLES if what in record["calibration"]), "text")
        yield f"It was fitted to the kinds of {what} that it was calibrated on, and is worse on others than is said here."
    if measured and encoder:
        yield (
            f"How far its {STATES} are from the dense model's was measured on {measured['tokens']:,} {_unit(measured)}, which is a "
            f"check and not a benchmark. What it is used for was not measured."
        )
    elif measured:
        yield (
            f"Perplexity was measured on {measured['tokens']:,} tokens of one kind of text, which is a check and not a benchmark. "
            f"{'Safety' if facts.tasks else 'Tasks, safety'} and other languages were not measured."
        )
    else:
        yield "Its quality was not measured."
