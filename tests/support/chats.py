"""Made-up conversations for tests, and templates that are written as published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2: the system message within the first question, blanks around answers, and no prompt of its own for an answer.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>' + system + '<</SYS>>' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Qwen 3: the last answer begins with an empty thought, and thoughts are left out of earlier ones.
THINKING = (
    "{%- set last = namespace(asked=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.asked = loop.index0 %}{%- endif %}{%- endfor %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
    "{%- if loop.index0 > last.asked %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content.split('</think>')[-1].lstrip('\n') }}{%- else %}{{- message.content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def messages(*said: str, system: str | None = None) -> Messages:
    """Questions and answers in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said))]


def sums(count: int = 60) -> list[Messages]:
    """Conversations about sums, of one and of two answers."""
    made = []
    for number in range(count):
        a, b = number % 14, number * 7 % 11
        said = [f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."]
        more = ["Sure?", "Yes."] if number % 3 == 0 else []
        made.append(messages(*said, *more, system="You add numbers." if number % 4 == 0 else None))
    return made


def write_chats(path: Path, chats: list[Messages]) -> str:
    """A file of OpenAI's form."""
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return str(path)
