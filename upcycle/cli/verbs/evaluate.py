"""``upcycle evaluate``: measures perplexity and expert load, scores on tasks, or speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.habits_table import habit_tables
from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, note, print_facts, print_json, print_table
from upcycle.evaluation.score_table import score_rows
from upcycle.evaluation.speed_table import speed_rows
from upcycle.evaluation.timed_dtype import TIMED_DTYPES
from upcycle.files.user_paths import user_path


@click.command("evaluate", short_help="Measure perplexity, expert load or speed")
@click.argument("model")
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text file, or the embedded prose or code (repeatable)  [default: prose and code]",
)
@click.option("--reference", metavar="DENSE", help="another model, usually the dense one, measured in the same way")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="tokens per window")
@click.option("--stride", type=click.IntRange(1), help="tokens between windows  [default: half a window]")
@click.option("--tokens", type=click.IntRange(2), help="most tokens to read of each text  [default: 8192]")
@click.option("--full", is_flag=True, help="read whole texts")
@click.option(
    "--tasks",
    metavar="NAME[,NAME]",
    help="tasks, groups or tags of lm-eval to score instead of texts; * matches anything",
)
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="folder with your own tasks: .yaml files without code, and their data",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="only the first N questions of each task")
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="sequences per forward pass of a task"
)
@click.option(
    "--images",
    metavar="FOLDER",
    help="for encoders of images: .png and .jpg files; of a classifier, in a subfolder per class; of CLIP, a caption beside each",
)
@click.option(
    "--column", default="text", show_default=True, help="of a model of two texts: the encoder's column of --text"
)
@click.option("--target", help="of a model of two texts: the decoder's column")
@click.option("--speed", is_flag=True, help="time prefill and decoding, and measure memory, instead of perplexity")
@click.option(
    "--dtype",
    type=click.Choice(TIMED_DTYPES),
    help="that --speed computes in  [default: auto, the stored one where this machine multiplies it natively, else float32]",
)
@click.option("--routing", is_flag=True, help="ask what routers follow: token ids, places in a window, earlier models")
@click.option(
    "--earlier",
    multiple=True,
    metavar="RUN",
    help="with --routing: a training run, whose checkpoints are compared, or an earlier model (repeatable)",
)
@quiet_option
@common_options
def command(
    model: str,
    text: tuple[str, ...],
    reference: str | None,
    window: int,
    stride: int | None,
    tokens: int | None,
    full: bool,
    tasks: str | None,
    task_folder: Path | None,
    limit: int | None,
    batch: int,
    images: str | None,
    column: str,
    target: str | None,
    speed: bool,
    dtype: str | None,
    routing: bool,
    earlier: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure the perplexity of MODEL in fp32 and how evenly it uses its experts; with --tasks, its scores; with --speed, its speed.

    MODEL is a folder, a hub id, a .gguf file or demo; dense or MoE. If upcycle wrote MODEL, scores and speed are saved in its
    evaluation.json, from which upcycle report shows both and the model card shows the scores.

    \b
    upcycle evaluate ./moe --reference ./llama
    upcycle evaluate ./moe --reference ./llama --tasks arc_easy,hellaswag --limit 500
    upcycle evaluate ./moe --tasks my_task --task-folder ./tasks
    upcycle evaluate ./moe --reference ./llama --speed
    upcycle evaluate ./healed/model --routing --earlier ./healed
    upcycle evaluate ./vit-moe --reference ./vit --images ./photos
    upcycle evaluate ./t5-moe --reference ./t5 --text pairs.jsonl --column question --target answer

    Encoders are measured by what they are for: masked language models by pseudo-perplexity (each token from all others of a window
    of at most 128), image classifiers by accuracy and agreement with --reference, others by the cosine of their embeddings with
    those of --reference and by how many of the ten nearest neighbours are the same. Of an encoder and a decoder, it is the loss of
    what the decoder writes; of CLIP, also how often an image finds its caption.
    """
    from upcycle.evaluation.evaluate import evaluate

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise click.UsageError("--tasks names no task")
    result = evaluate(
        model,
        text=text,
        reference=reference,
        window=window,
        stride=stride,
        tokens=tokens,
        full=full,
        tasks=names,
        task_folder=task_folder,
        limit=limit,
        batch=batch,
        speed=speed,
        dtype=dtype,
        images=images,
        column=column,
        target=target,
        routing=routing,
        earlier=earlier,
        progress=ProgressBars(quiet),
    )
    if as_json:
        print_json(result.as_dict())
        return
    if result.texts:
        _print_texts(result)
    if result.embeddings or result.classes or result.retrieval:
        print_facts(_encoder_facts(result))
    if result.layers:
        _print_load(result.layers)
    if result.routing:
        for title, head, cells in habit_tables(result.routing):
            print_table(head, cells, right=range(len(head)), title=title)
    if result.tasks:
        _print_tasks(result.tasks)
    if result.speed:
        columns, rows, about = speed_rows(result.speed.as_dict())
        print_table(columns, rows, right=range(1, len(columns)), title=about)
    if user_path(model).is_dir():  # of whose numbers a page can be made
        print_facts([("next", f"upcycle report {model}")])


def _print_tasks(tasks: Any) -> None:
    first = f", the first {tasks.limit:,} questions of each task" if tasks.limit else ""
    columns, rows = score_rows(tasks.as_dict())
    print_table(columns, rows, right=range(2, len(columns)), title=f"{tasks.harness}{first}")


def _encoder_facts(result: Any) -> list[tuple[str, str]]:
    facts = []
    if (found := result.embeddings) is not None:
        facts = [
            ("embeddings", f"{found.items:,} {found.what}, beside {result.reference}"),
            ("mean cosine", f"{found.cosine:.4f}"),
            (f"recall@{found.nearest}", f"{found.recall:.1%} of the nearest neighbours are the same"),
        ]
    if (pairs := result.retrieval) is not None:
        facts += [
            (f"{one} to {other}", _shares(pairs.nearest, found, beside))
            for one, other, found, beside in (
                ("image", "caption", pairs.image_to_text, pairs.reference_image_to_text),
                ("caption", "image", pairs.text_to_image, pairs.reference_text_to_image),
            )
        ]
    if (classes := result.classes) is not None:
        facts += [
            ("images", f"{classes.images:,} of {classes.classes:,} classes"),
            ("accuracy", f"{classes.accuracy:.2%}"),
        ]
        if classes.agreement is not None:
            facts.append(
                ("reference", f"accuracy {classes.reference_accuracy:.2%}, the same class for {classes.agreement:.2%}")
            )
    return facts


def _shares(nearest: list[int], found: list[float], reference: list[float] | None) -> str:
    said = [
        f"recall@{k} {share:.1%}" + (f" (reference {reference[i]:.1%})" if reference else "")
        for i, (k, share) in enumerate(zip(nearest, found, strict=True))
    ]
    return ", ".join(said)


def _print_texts(result: Any) -> None:
    from upcycle.verification.verdict import said

    columns = ["text", "tokens", "nats/token", "perplexity"]
    rows = []
    for text in result.texts:
        row = [text.text, f"{text.predicted:,}", f"{text.nats_per_token:.4f}", said(text.perplexity, ".3f")]
        if result.reference:
            change = math.expm1(min(text.nats_per_token - text.reference_nats_per_token, 700.0))
            row += [said(text.reference_perplexity, ".3f"), f"{change:+.1%}"]
        rows.append(row)
    if result.reference:
        columns += ["reference", "change"]
    pseudo = result.window == result.stride
    title = f"windows of {result.window} tokens, " + ("pseudo-perplexity" if pseudo else f"stride {result.stride}")
    title = title if result.stride else "what the decoder writes"
    print_table(columns, rows, right=range(1, len(columns)), title=title)
    for text in result.texts:
        if text.remark:
            note(f"{text.text}: {text.remark}")


def _print_load(layers: list[Any]) -> None:
    rows = [
        [
            str(layer.layer),
            f"{layer.max_over_mean:.2f}",
            f"{layer.entropy:.3f}",
            ", ".join(map(str, layer.dead_experts)) or "none",
            " ".join(f"{share:.0%}" for share in layer.load[:16]) + (" ..." if len(layer.load) > 16 else ""),
        ]
        for layer in layers
    ]
    print_table(["layer", "max/mean", "entropy", "dead", "load"], rows, right=[0, 1, 2], title="\nexpert load")
