"""Rows that are tokenised in one call come out as those that are rendered one by one, which is the slow twin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield.data import RenderConfig, Renderer, read, render_all
from gradshield.types import Rendered
from tests.data.test_render import ALTERNATING, CHATML, LLAMA2, REWRITING
from tests.tiny import tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}
text = st.text(max_size=12).map(lambda t: t.replace("\0", "") + "x")
user = text.map(lambda t: {"role": "user", "content": t})
assistant = st.tuples(text, st.sampled_from([None, 1, 0])).map(
    lambda a: {"role": "assistant", "content": a[0], **({} if a[1] is None else {"weight": a[1]})}
)
answer = text.map(lambda t: {"role": "assistant", "content": t})
chat = st.tuples(st.lists(st.one_of(user, assistant), max_size=3), answer).map(lambda c: [*c[0], c[1]])
row = st.one_of(
    chat.map(lambda c: {"messages": c}),
    chat.map(lambda c: {"messages": c, "tools": [TOOL]}),
    chat.map(lambda c: {"messages": c, "chat_template_kwargs": {"bos_token": "<s>"}}),
    st.tuples(chat, answer).map(lambda c: {"prompt": c[0], "completion": [c[1]]}),
    st.tuples(chat, answer, answer).map(lambda c: {"prompt": c[0], "chosen": [c[1]], "rejected": [c[2]]}),
    st.tuples(text, text).map(lambda t: {"prompt": t[0], "completion": t[1]}),
)
CONFIGS = [
    RenderConfig(),
    RenderConfig(assistant_only_loss=False),
    RenderConfig(max_length=9, truncation_mode="keep_end"),
    RenderConfig(completion_only_loss=False, eos_token="<s>"),
]


def plain(found: Rendered) -> Any:
    return found.row, found.id, [(t.ids.tolist(), t.loss.tolist(), t.coefficient) for t in found.sequences]


@pytest.mark.filterwarnings("ignore:the tokenizer has no chat template")
@pytest.mark.parametrize("template", [None, CHATML, LLAMA2, REWRITING, ALTERNATING])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row, min_size=1, max_size=6), config=st.sampled_from(CONFIGS))
def test_together_is_one_by_one(template: str | None, rows: list[Any], config: RenderConfig) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    examples = list(read(rows).examples)
    alone = [Renderer(tokenizer, config).render(example) for example in examples]
    together = render_all(examples, tokenizer, config)
    assert [plain(r) for r in together.rendered] == [plain(r) for r in alone if isinstance(r, Rendered)]
    assert [q.reason for q in together.quarantined] == [r for r in alone if isinstance(r, str)]


def test_rows_are_tokenised_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the property above is not one of rows that were rendered one by one after all."""
    calls = []
    apply = Renderer._apply

    def counted(self: Renderer, messages: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(messages))
        return apply(self, messages, *arguments, **options)

    monkeypatch.setattr(Renderer, "_apply", counted)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes"}]}
        for n in range(300)
    ]
    done: list[int] = []
    assert len(render_all(read(rows).examples, tiny_tokenizer(), progress=done.append).rendered) == 300
    assert calls == [256, 44] and done == [256, 300]
