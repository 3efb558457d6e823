"""Which template turns conversations into text: the tokenizer's own, one in a file, or one of two that come with upcycle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path

CHAT_TEMPLATE_FILE = (
    "chat_template.jinja"  # in a model's folder; transformers prefers it to one in tokenizer_config.json
)
_MOST_BYTES = 1 << 20
# Lines that begin with who speaks, for base models: nothing but the end-of-text token need be in the vocabulary.
_TURNS = """\
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'User: ' + message.content + '\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
{%- elif message.role != 'system' or not loop.first -%}
{{- raise_exception('the template turns knows user, assistant, and a system message at the beginning; message '
    ~ loop.index ~ ' is of ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
_MARKS = ("<|im_start|>", "<|im_end|>")
BUILT_IN = {"turns": _TURNS, "chatml": _CHATML}


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source in Jinja, and what messages call it. ``own``: it is the tokenizer's, as it stands."""

    source: str
    name: str
    own: bool


def find_template(tokenizer: Any, named: str | None, processor: Any = None, key: str = "data") -> ChatTemplate:
    """The template that a recipe names, or else the tokenizer's own.

    Args:
        tokenizer: the model's.
        named: ``data.chat_template``.
        processor: the model's, whose template is taken where the tokenizer has none.
        key: where the data stand in the recipe, for messages.

    Raises:
        UsageError: the tokenizer has none and the recipe names none, the file cannot be read, or the tokenizer lacks the tokens of
            ``chatml``.
    """
    if named is None:
        source = (
            getattr(processor, "chat_template", None) if getattr(tokenizer, "chat_template", None) is None else None
        )
        if isinstance(source, str):
            return ChatTemplate(source, "the processor's chat template", own=True)
        return _own(tokenizer, key)
    if named in BUILT_IN:
        unknown = next((mark for mark in _MARKS if named == "chatml" and len(_ids(tokenizer, mark)) != 1), None)
        if unknown:
            raise UsageError(
                f"{key}.chat_template: chatml needs the token {unknown}, which the tokenizer does not have",
                hint="use chat_template: turns, which needs no tokens of its own",
            )
        return ChatTemplate(BUILT_IN[named], named, own=False)
    path = user_path(named)
    try:
        content = path.read_bytes()[: _MOST_BYTES + 1]
        if len(content) > _MOST_BYTES:
            raise UsageError(f"{key}.chat_template: {path} has more than {_MOST_BYTES} bytes, which no template has")
        source = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"{key}.chat_template: {named} cannot be read: {reason}",
            hint=f"a file with a Jinja template, or one of {', '.join(BUILT_IN)}",
        ) from None
    _check_syntax(source, f"{key}.chat_template: {path}")
    return ChatTemplate(source, named, own=False)


def kept_template(tokenizer: Any, named: Iterable[tuple[str, str | None]]) -> str | None:
    """The source of the template that a trained model keeps: the last that its stages' data name; ``None``: its tokenizer's.

    Args:
        tokenizer: the model's.
        named: of every stage, where its data stand in the recipe, and their ``chat_template``.

    Raises:
        UsageError: as :func:`find_template`.
    """
    found = [(key, name) for key, name in named if name is not None]
    return find_template(tokenizer, found[-1][1], key=found[-1][0]).source if found else None


def _own(tokenizer: Any, key: str) -> ChatTemplate:
    missing = None
    if getattr(tokenizer, "chat_template", None) is None:
        missing = "the tokenizer has no chat template"
    else:
        try:
            source: str = tokenizer.get_chat_template()
        except ValueError:
            missing = "the tokenizer has several chat templates, and none is called default"
    if missing:
        raise UsageError(
            f"{key}: there are conversations, and {missing}",
            hint=f"name one in the data, or by --set {key}.chat_template=turns: turns, chatml, or a file, such as "
            "chat_template.jinja of the model's chat version",
        )
    return ChatTemplate(source, "the tokenizer's chat template", own=True)


def _check_syntax(source: str, where: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node, Scope

    class Generation(Extension):
        """transformers' own block, of which only the syntax matters here."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    try:
        Environment(extensions=[Generation, loopcontrols]).parse(source)  # nothing is rendered
    except TemplateSyntaxError as error:
        raise UsageError(f"{where} is not a Jinja template: line {error.lineno}: {error.message}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
