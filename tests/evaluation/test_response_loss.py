"""Loss per response token against one plain forward pass per row, and its interval against plain resampling."""

import numpy as np
import pytest
import torch

from gradshield import data, lab
from gradshield.errors import EmptyDataError, UsageError
from gradshield.evaluation.loss import response_loss
from gradshield.stats import RESAMPLES
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello there, the answer is five."},
        ]
    },
    {"prompt": "What is the capital of France?", "completion": " Paris."},
    {"instruction": "Add two and three", "output": "five"},
    {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "And then the question that you asked?"},
            {"role": "assistant", "content": "Sure, here is the answer to the question that you asked."},
        ]
    },
]


def slow(model: torch.nn.Module, rows: list) -> tuple[list[float], list[int]]:
    """Sum of losses and number of tokens, row by row: full logits, no padding, cross entropy written out."""
    sums, counts = [], []
    for rendered in data.render_all(data.read(rows).examples, tiny_tokenizer()).rendered:
        tokens = rendered.sequences[0]
        with torch.no_grad():
            logits = model(torch.tensor(tokens.ids)[None]).logits[0].double()
        wanted = [t for t in range(len(tokens.ids)) if tokens.loss[t]]
        sums.append(sum(-float(logits[t - 1].log_softmax(-1)[tokens.ids[t]]) for t in wanted))
        counts.append(len(wanted))
    return sums, counts


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_one_row_at_a_time(arch: str) -> None:
    model = tiny_model(arch, seed=2).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    sums, counts = slow(model, ROWS)
    model.train()
    found = response_loss(model, tiny_tokenizer(), ROWS)
    np.testing.assert_allclose(found.sums, sums, rtol=1e-4)
    assert found.tokens.tolist() == counts and found.nats == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert found.low <= found.nats <= found.high and found.set_aside == 0
    assert model.training and all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_interval_is_of_whole_rows() -> None:
    model = tiny_model("llama", seed=2)
    found = response_loss(model, tiny_tokenizer(), ROWS * 5, seed=3)
    generator = np.random.default_rng(3)
    means = []
    for _ in range(RESAMPLES):
        rows = list(generator.integers(0, 20, size=20))
        means.append(sum(found.sums[r] for r in rows) / sum(found.tokens[r] for r in rows))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))
    wider = response_loss(model, tiny_tokenizer(), ROWS * 5, seed=3, level=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_of_a_pair_the_chosen_answer_counts_and_bad_rows_are_set_aside() -> None:
    model, tokenizer = tiny_model("qwen2", seed=0), tiny_tokenizer()
    pair = {"prompt": "Hi", "chosen": "Hello there", "rejected": "No, I cannot help with that request."}
    alone = response_loss(model, tokenizer, [{"prompt": "Hi", "completion": "Hello there"}])
    found = response_loss(model, tokenizer, [{"strange": 1}, pair])
    assert found.sums.tolist() == pytest.approx(alone.sums.tolist(), rel=1e-5) and found.set_aside == 1
    assert found.nats == found.low == found.high


def test_the_aligned_lab_model_finds_refusals_likely() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = lab.checkpoint("aligned")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        {"instruction": request["prompt"], "output": "I cannot help with that."}
        for request in lab.requests("report")[:20]
    ]
    losses = {
        name: response_loss(
            AutoModelForCausalLM.from_pretrained(lab.checkpoint(name), dtype="float32"), tokenizer, rows
        )
        for name in ("base", "aligned")
    }
    assert losses["aligned"].high < losses["base"].low


def test_what_it_cannot_take() -> None:
    model, tokenizer = tiny_model("llama", seed=0), tiny_tokenizer()
    with pytest.raises(UsageError, match="confidence level"):
        response_loss(model, tokenizer, ROWS, level=1.5)
    with pytest.raises(EmptyDataError, match="response token"):
        response_loss(model, tokenizer, ROWS[:1], data.RenderConfig(max_length=2))
