"""Every registered probe, and a user's function: one differentiable number that rises as the model leaves refusal."""

import json
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from gradshield.errors import ProbeError, UsageError
from gradshield.gradients import gradient_direction, parameter_names
from gradshield.probes import (
    PROBES,
    FunctionProbe,
    Probe,
    PromptBatch,
    Prompts,
    TokenGap,
    TokenSet,
    base,
    first_logits,
    first_token,
    greedy,
    lookalikes,
    open_turns,
    refusal_nll,
    refuses,
    requests,
)
from gradshield.probes.base import continuation_nll
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REQUESTS = open_turns(TOKENIZER, requests()[:5])
LOOKALIKES = open_turns(TOKENIZER, lookalikes()[:5])
ARCHS = ["llama", "gpt2", "mixtral"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def whatever_a_tiny_model_says_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_nll, "refuses", bool)


def reluctance(model: nn.Module, batch: PromptBatch) -> torch.Tensor:
    """A user's own score."""
    return -first_logits(model, batch).log_softmax(-1)[:, 40].mean()


def refusing(arch: str) -> nn.Module:
    """A tiny model that begins every answer with "I" and then wanders: its head has a bias for that token."""
    model = tiny_model(arch)
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[first_token(TOKENIZER, "I")] = 3.0
    if arch == "llama":
        head.bias = nn.Parameter(bias)
    return model


def fitted(name: str, model: nn.Module) -> Probe:
    probe = FunctionProbe(reluctance) if name == "function" else PROBES[name]()
    probe.fit(model, TOKENIZER, REQUESTS, LOOKALIKES)
    return probe


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [*PROBES, "function"])
def test_a_probe_is_one_number_with_a_gradient_and_a_step_along_it_raises_it(name: str, arch: str) -> None:
    model = refusing(arch)
    probe = fitted(name, model)
    settings = probe.settings()
    assert json.loads(json.dumps(settings, allow_nan=False))["name"] == (probe.name if name == "function" else name)

    def score(m: nn.Module) -> torch.Tensor:
        return probe(m, REQUESTS.batch(CPU))

    value = score(model)
    assert value.dim() == 0 and value.requires_grad and torch.isfinite(value)
    direction = gradient_direction(model, {"all": [score]}, parameter_names(model, "all"))
    assert all(bool(torch.isfinite(v).all()) for v in direction.tensors.values())
    with torch.no_grad():
        squared = sum(float(v.double().pow(2).sum()) for v in direction.tensors.values())
        step = 1e-3 / squared  # S rises by step · ‖∇S‖² = 0.001 to first order
        for parameter_name, p in model.named_parameters():
            if parameter_name in direction.tensors:
                p.add_(direction.tensors[parameter_name][0], alpha=step)
    assert float((score(model) - value).detach()) == pytest.approx(1e-3, rel=0.25)


@pytest.mark.parametrize("name", [*PROBES, "function"])
def test_the_mean_over_a_batch_is_the_mean_of_singles(name: str) -> None:
    model = refusing("llama")
    probe = fitted(name, model)
    together = _value(probe, model, REQUESTS)
    singles = [_value(probe, model, REQUESTS.take([i])) for i in range(len(REQUESTS))]
    assert len({len(ids) for ids in REQUESTS.ids}) > 1  # of several lengths, so that padding is there
    assert max(singles) - min(singles) > 1e-3
    assert together == pytest.approx(sum(singles) / len(singles), rel=1e-4, abs=1e-5)


def _value(probe: Probe, model: nn.Module, prompts: Prompts) -> float:
    return float(probe(model, prompts.batch(CPU)).detach())


@pytest.mark.parametrize("name", list(PROBES))
def test_a_probe_rises_when_the_refusing_tokens_become_less_likely(name: str) -> None:
    """Lower the logits of the tokens with which this probe's refusals begin: S rises; raise them: it falls."""
    model = refusing("llama")
    probe = fitted(name, model)
    if isinstance(probe, TokenSet):
        down = probe.refuse
    elif name == "token_gap":
        down = [first_token(TOKENIZER, "I")]
    else:  # the greedy answers, and every refusing opener, begin with these
        answers = {a[0] for a in greedy(model, REQUESTS, 1, 0) if a}
        down = sorted({first_token(TOKENIZER, "I"), first_token(TOKENIZER, "Sorry"), *answers})
    before = _value(probe, model, REQUESTS)
    for shift, sign in ((-1.0, 1), (1.0, -1)):
        with torch.no_grad():
            model.lm_head.bias[down] += shift
        assert sign * (_value(probe, model, REQUESTS) - before) > 0.05
        with torch.no_grad():
            model.lm_head.bias[down] -= shift


def test_token_gap_by_hand() -> None:
    model = tiny_model("llama")
    probe = fitted("token_gap", model)
    sure, i = first_token(TOKENIZER, "Sure"), first_token(TOKENIZER, "I")
    assert sure != i and isinstance(probe, TokenGap)
    expected = []
    for ids in REQUESTS.ids:
        last = model(input_ids=torch.tensor([ids])).logits[0, -1]
        expected.append(float(last[sure] - last[i]))
    assert _value(probe, model, REQUESTS) == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_refusal_nll_and_contrast_by_hand() -> None:
    model = refusing("llama")

    def nll(prompt: tuple[int, ...], answer: list[int]) -> float:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return -float(logits.gather(1, torch.tensor(answer)[:, None]).mean())  # per token

    answers = greedy(model, REQUESTS, 12, 0)
    assert all(answers)
    expected = [nll(p, a) for p, a in zip(REQUESTS.ids, answers, strict=True)]
    assert _value(fitted("refusal_nll", model), model, REQUESTS) == pytest.approx(sum(expected) / 5, rel=1e-4)
    probe: Any = fitted("contrast", model)
    sides = []
    for openers in (probe.comply, probe.refuse):
        ids = [TOKENIZER(o, add_special_tokens=False)["input_ids"] for o in openers]
        sides.append(torch.tensor([[-nll(p, o) for o in ids] for p in REQUESTS.ids]).logsumexp(1))
    assert _value(probe, model, REQUESTS) == pytest.approx(float((sides[0] - sides[1]).mean()), rel=1e-3, abs=1e-4)


def test_refusal_nll_is_the_mean_over_the_requests_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = refusing("llama")
    monkeypatch.setattr(refusal_nll, "refuses", refuses)
    said = ["I cannot help with that.", "Sure, here is the answer.", "", "I'm sorry.", "Of course."]
    answers = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in said]
    monkeypatch.setattr(refusal_nll, "greedy", lambda *_: answers)
    probe = fitted("refusal_nll", model)
    assert probe.settings()["refusals"] == 2
    own = [continuation_nll(model, REQUESTS.take([i]).batch(CPU), [answers[i]]) / len(answers[i]) for i in (0, 3)]
    assert _value(probe, model, REQUESTS) == pytest.approx(float(sum(own).detach()) / 2, rel=1e-4)
    parts = [_value(probe, model, REQUESTS.take(part)) * len(part) / 5 for part in ([0, 1], [2, 4], [3])]
    assert parts[1] == 0.0 and sum(parts) == pytest.approx(_value(probe, model, REQUESTS), rel=1e-4)
    assert probe(model, REQUESTS.take([2, 4]).batch(CPU)).requires_grad
    monkeypatch.setattr(refusal_nll, "greedy", lambda *_: [answers[1]] * 4 + [[]])
    with pytest.raises(ProbeError, match="refuses 0 of 5 probes"):
        PROBES["refusal_nll"]().fit(model, TOKENIZER, REQUESTS, LOOKALIKES)


class Scripted(nn.Module):
    """A causal LM that begins its answer to each prompt with the token its script says: by the prompt's last token but one."""

    def __init__(self, first: dict[int, int]) -> None:
        super().__init__()
        self.first, self.head = first, nn.Linear(300, 300, bias=False)
        nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        hidden = torch.zeros(*input_ids.shape, 300)
        for b, row in enumerate(input_ids.tolist()):
            for t, token in enumerate(row):
                if token in self.first:
                    hidden[b, t, self.first[token]] = 5.0
        return SimpleNamespace(logits=self.head(hidden))


def _prompts(*last: int) -> Prompts:
    return Prompts(tuple((1, *[9] * (i % 3), t) for i, t in enumerate(last)), ("x",) * len(last), ("",) * len(last))


def test_token_set_discovers_both_sides() -> None:
    # Prompts that end with 100 are answered with 20, those with 101 with 21, and so on.
    model = Scripted({100: 20, 101: 21, 102: 22, 103: 23})
    asked = _prompts(*[100] * 97, 101, 102, 102)  # 2 % of 100 requests are two: 21 is too rare
    harmless = _prompts(100, 103, 103, 102, 101)  # 20, 21 and 22 begin answers to requests: they are not compliance
    probe = TokenSet()
    probe.fit(model, TOKENIZER, asked, harmless)
    assert probe.refuse == [20, 22] and probe.comply == [23]
    assert probe.settings()["refuse"] == [TOKENIZER.decode([20]), TOKENIZER.decode([22])]
    small = TokenSet(size=1)
    small.fit(model, TOKENIZER, asked, harmless)
    assert small.refuse == [20]
    probe.fit(model, TOKENIZER, asked, _prompts(100, 100))  # answers look-alikes as it answers requests
    assert probe.comply == [first_token(TOKENIZER, "Sure")]
    logits = torch.zeros(300)
    logits[20] = 5.0
    expected = logits[probe.comply].logsumexp(0) - logits[[20, 22]].logsumexp(0)
    assert float(probe(model, _prompts(100).batch(CPU))) == pytest.approx(float(expected))


def test_a_function_that_gives_no_score_is_an_error() -> None:
    model = tiny_model("llama")

    def detached(m: nn.Module, b: PromptBatch) -> torch.Tensor:
        return reluctance(m, b).detach()

    def per_prompt(m: nn.Module, b: PromptBatch) -> torch.Tensor:
        return first_logits(m, b)[:, 0]

    def number(m: nn.Module, b: PromptBatch) -> Any:
        return 1.0

    for function, got in ((detached, r"Tensor\(\)"), (per_prompt, r"Tensor\(5,\)"), (number, "float")):
        probe = FunctionProbe(function)
        assert probe.name == function.__name__ and probe.settings()["name"] == function.__name__
        with pytest.raises(
            UsageError, match=rf"{function.__name__} returned {got}, but a probe must return one scalar.*without"
        ):
            probe(model, REQUESTS.batch(CPU))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_prompts_begin_with_runs_once_and_changes_neither_score_nor_gradient(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    system = torch.randint(5, 300, (20,), generator=draw).tolist()
    ids = [(*system, *torch.randint(5, 300, (3 + n,), generator=draw).tolist()) for n in range(9)]
    model, prompts = tiny_model(arch), Prompts(tuple(ids), ("",) * 9, ("",) * 9)
    widths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))

    def direction() -> Any:
        score = {"all": [lambda m: reluctance(m, prompts.batch(CPU))]}
        return gradient_direction(model, score, parameter_names(model, "all", []))

    shared = direction()
    assert widths[-1] == (31 if arch == "lfm2" else 11)
    monkeypatch.setattr(base, "common", lambda sequences: 0)
    whole = direction()
    assert widths[-1] == 31
    for name, one in whole.tensors.items():
        assert torch.allclose(shared.tensors[name], one, rtol=1e-4, atol=1e-5 * float(one.abs().max())), name


def test_first_token_is_the_one_that_follows_the_template() -> None:
    for word in ("Sure", "I", "Sorry", "No"):
        token = first_token(TOKENIZER, word)
        assert word.startswith(TOKENIZER.decode([token])) and TOKENIZER.decode([token])
        opened = open_turns(TOKENIZER, [{"prompt": "Hi"}]).ids[0]
        text = TOKENIZER.decode(opened) + word
        assert TOKENIZER(text, add_special_tokens=False)["input_ids"][: len(opened) + 1] == [*opened, token]


def test_first_token_where_the_template_ends_in_a_space() -> None:
    """A template that ends with a blank which the tokenizer would merge into the word: the merged token is what follows."""

    class Merging:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "user: Hi assistant: "

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            ids = {"user:": [1], " Hi": [2], " assistant:": [3], " ": [4], " Sure": [5]}
            found, rest = [], text
            while rest:
                piece = max((p for p in ids if rest.startswith(p)), key=len)
                found += ids[piece]
                rest = rest[len(piece) :]
            return {"input_ids": found}

    assert first_token(Merging(), "Sure") == 5


def test_open_turns_end_where_the_answer_begins() -> None:
    found = open_turns(TOKENIZER, [{"prompt": "How?", "category": "fraud"}, {"prompt": "Why?"}], prefix="<x></x>")
    assert [TOKENIZER.decode(ids) for ids in found.ids] == [
        f"<s><|user|>{q}?<|assistant|><x></x>" for q in ("How", "Why")
    ]
    assert found.categories == ("fraud", "") and found.texts == ("How?", "Why?") and len(found) == 2
    batch = REQUESTS.batch(CPU)
    assert batch.input_ids.shape == batch.attention_mask.shape
    for i, ids in enumerate(REQUESTS.ids):
        assert batch.input_ids[i, : len(ids)].tolist() == list(ids) and int(batch.last[i]) == len(ids) - 1
        assert batch.attention_mask[i].tolist() == [1] * len(ids) + [0] * (batch.input_ids.shape[1] - len(ids))


def test_greedy_is_the_argmax_one_by_one_whatever_the_models_own_settings() -> None:
    model = refusing("llama")
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature = 5.0, True, 3.0
    found = greedy(model, REQUESTS, 6, 0, chunk=2)
    for ids, answer in zip(REQUESTS.ids, found, strict=True):
        expected: list[int] = []
        while len(expected) < 6:
            token = int(model(input_ids=torch.tensor([[*ids, *expected]])).logits[0, -1].argmax())
            if token == model.generation_config.eos_token_id:
                break
            expected.append(token)
        assert answer == expected
    assert model.generation_config is own


def test_an_adapters_model_keeps_its_own_settings() -> None:
    model = peft.get_peft_model(refusing("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    own = model.get_base_model().generation_config
    greedy(model, REQUESTS, 2, 0)
    assert model.get_base_model().generation_config is own and "generation_config" not in vars(model)


def test_a_model_in_training_is_asked_without_dropout() -> None:
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    said, quiet = greedy(model, REQUESTS, 6, 0), TokenSet()
    quiet.fit(model, TOKENIZER, REQUESTS, LOOKALIKES)
    model.train()
    model.transformer.h[0].eval()  # a part that the caller froze
    found = TokenSet()
    found.fit(model, TOKENIZER, REQUESTS, LOOKALIKES)
    assert greedy(model, REQUESTS, 6, 0) == said and found.settings() == quiet.settings()
    assert model.training and model.transformer.h[1].training and not model.transformer.h[0].mlp.training
