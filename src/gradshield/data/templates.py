"""The choice of chat template, and the default for tokenizers without one."""

from __future__ import annotations

import re
import warnings
from typing import Any

from gradshield.errors import ModelError

# One turn is ``<|role|>\n`` + content + end of sequence + ``\n``; what the model writes is content + end of sequence:
#
#     <|user|>
#     What is the capital of France?</s>
#     <|assistant|>
#     Paris.</s>
#
# Tool calls follow the content as JSON. Newlines keep the content's tokens separate from the header's.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|tools|>\\n' + tools | tojson + '\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% set text = m.content | default('') %}"
    "{% if text is not string %}{% set text = text | map(attribute='text') | join %}{% endif %}"
    "{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ text }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ text + (eos_token | default('')) }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_markers(template: str) -> bool:
    """Whether the template marks what the assistant writes with ``{% generation %}``."""
    return _MARKERS.search(template) is not None


def missing(tokenizer: Any) -> str | None:
    """The default template, with a warning, for a tokenizer that has none; None for one that has its own."""
    if tokenizer.chat_template:
        return None
    warnings.warn(
        "the tokenizer has no chat template, so messages are rendered with GradShield's default one "
        "(<|role|>, newline, content, end of sequence): set tokenizer.chat_template if you train with another",
        UserWarning,
        stacklevel=4,
    )
    return DEFAULT_CHAT_TEMPLATE


def marked_copy(tokenizer: Any, needed: bool) -> str | None:
    """TRL's marked copy of the tokenizer's template, which it trains with under ``assistant_only_loss=True``.

    None if the template marks the answers itself; without ``needed``, also if TRL is not installed or has no copy. Raises
    ModelError if markers are needed, and neither the template nor TRL has them.
    """
    if not tokenizer.chat_template or has_markers(default_variant(tokenizer.chat_template)):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)
    except Exception as error:  # TRL renders a conversation, and a template is the model's own program
        if not needed:
            return None
        remedy = "install gradshield[train]" if isinstance(error, ImportError) else "add the markers to the template"
        raise ModelError(
            "assistant_only_loss=True needs a chat template with {% generation %} markers, and the tokenizer's has "
            f"none that TRL can add: {remedy}, or leave assistant_only_loss out to find responses by difference"
        ) from None


def default_variant(template: str | dict[str, str]) -> str:
    """The template itself, or the variant named ``default`` if a tokenizer has several."""
    return template if isinstance(template, str) else template.get("default", next(iter(template.values())))
