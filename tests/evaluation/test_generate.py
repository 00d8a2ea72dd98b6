"""The batched generator against its slow twin, and what it must leave as it found it."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gradshield.errors import DataError
from gradshield.evaluation.generate import Prompt, encode, generator
from gradshield.models.decoding import stop_tokens
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

PROMPTS: list[Prompt] = [
    "How do I bake bread?",
    "Hi",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}],
    "Write one long sentence about a loaf of bread that waits for the dough to rise and for the water to boil.",
    [
        {"role": "user", "content": "Add two and three."},
        {"role": "assistant", "content": "five"},
        {"role": "user", "content": "And one?"},
    ],
    "",
    "Hi",
]


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], new: int, prefix: str = ""
) -> list[str]:
    """The slow twin: one prompt, one full forward pass per token, no cache, no padding."""
    answers = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt, prefix)
        answer: list[int] = []
        while len(answer) < new:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
            if token in stop_tokens(model, tokenizer.eos_token_id):
                break
            answer.append(token)
        answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers


def _stopping(arch: str) -> PreTrainedModel:
    """A tiny model that ends some of its answers early: several tokens end an answer."""
    model = tiny_model(arch, seed=3)
    model.generation_config.eos_token_id = list(range(2, VOCABULARY, 24))
    if model.config.tie_word_embeddings:  # a random model with one table for both ends repeats its last token for ever
        weight = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight = torch.nn.Parameter(0.1 * weight)
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batches_answer_as_the_slow_twin_does(arch: str) -> None:
    model, tokenizer = _stopping(arch), tiny_tokenizer()
    answers = generator(model, tokenizer, max_new_tokens=12, batch_size=3)(PROMPTS)
    assert answers == one_by_one(model, tokenizer, PROMPTS, 12)
    assert len(set(answers)) > 3


def test_some_of_those_answers_end_early() -> None:
    model, tokenizer = _stopping("llama"), tiny_tokenizer()
    short, full = (generator(model, tokenizer, max_new_tokens=n)(PROMPTS) for n in (12, 24))
    assert any(a == b for a, b in zip(short, full, strict=True))
    assert any(a != b for a, b in zip(short, full, strict=True))


def test_the_prefix_is_continued_and_not_returned() -> None:
    model, tokenizer = _stopping("llama"), tiny_tokenizer()
    plain, forced = (generator(model, tokenizer, 8, prefix=prefix)(PROMPTS) for prefix in ("", "Sure, here is"))
    assert forced == one_by_one(model, tokenizer, PROMPTS, 8, "Sure, here is")
    assert forced != plain
    assert not any("Sure, here is" in answer for answer in forced)


def test_sampling_and_penalties_of_the_model_are_left_out() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generator(model, tokenizer, 16)(PROMPTS)
    asked = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0, eos_token_id=2, pad_token_id=0)
    model.generation_config = asked
    assert generator(model, tokenizer, 16)(PROMPTS) == expected
    assert model.generation_config is asked


def test_model_and_tokenizer_are_as_before_even_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = model.generation_config
    generate = generator(model, tokenizer, 4)
    for training in (True, False):
        model.train(training)
        generate(["Hi"])
        assert model.training is training
    model.train()
    model.model.layers[0].eval()  # a caller may keep a module in another mode
    modes = [module.training for module in model.modules()]
    generate(["Hi"])
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert tokenizer.padding_side == tiny_tokenizer().padding_side

    def broken(*_args: Any, **_more: Any) -> None:
        raise RuntimeError("out of memory")

    model.train()
    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(["Hi"])
    assert model.training
    assert model.generation_config is config


def test_no_prompts_give_no_answers() -> None:
    assert generator(tiny_model("llama"), tiny_tokenizer())([]) == []


def test_prompts_that_cannot_be_asked_are_named() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"prompt 1 has .* tokens, which with 64 new ones is more than the 512"):
        generator(tiny_model("gpt2"), tokenizer)(["Hi", "a b c d e f g h " * 60])


def test_a_tokenizer_without_a_template_gets_the_default_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, "Hi")).startswith("<s><|user|>\nHi</s>")
    assert tokenizer.chat_template is None


@pytest.mark.slow
def test_two_hundred_prompts_take_seconds() -> None:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = [f"Tell me about {'bread and ' * (i % 7)}number {i}" for i in range(200)]
    start = time.process_time()  # not the wall clock, which the neighbours of a busy machine share
    generator(model, tiny_tokenizer(), max_new_tokens=64)(prompts)
    assert time.process_time() - start < 12  # about 3 s
