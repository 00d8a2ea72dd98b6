"""One trial on the bundled lab: fine-tune its aligned model on some rows, and measure what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradshield import data as rows_in
from gradshield import lab
from gradshield.errors import UsageError
from gradshield.evaluation.asr import asr, over_refusal
from gradshield.evaluation.generate import generator
from gradshield.evaluation.judges import FunctionJudge, RefusalPhrases
from gradshield.evaluation.utility import utility
from gradshield.models import LoadedModel
from gradshield.pipeline.settings import Probing
from gradshield.types import EvalResult, Rate

Progress = Callable[[str, int, int], None]
ANSWER_TOKENS = 48  # longer than any answer of the lab's world
PROMPTS = 200  # of each kind


def lab_probing() -> Probing:
    """The lab's own requests and look-alikes: its model knows no other world."""
    return Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))


def lab_adapter() -> Any:
    """The adapter that the lab's recipe trains."""
    from peft import LoraConfig

    return LoraConfig(**lab.LORA)


def trained_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None) -> Any:
    """Rows as tokens and labels, exactly as a scan scores them: a ``Dataset`` for ``train``."""
    read = rows_in.read(list(rows))
    config = rows_in.RenderConfig(max_length=max_length or lab.RECIPE["max_length"])
    result = rows_in.render_all(read.examples, tokenizer, config, read.source)
    by_row = {example.row: example for example in read.examples}
    return rows_in.to_trl([by_row[row.row] for row in result.rendered], result.rendered)


def train(loaded: LoadedModel, dataset: Any, task: str, seed: int, stage: str, progress: Progress) -> Any:
    """A fine-tuned copy of the model, by the lab's recipe for the task. Raises UsageError when TRL is not installed."""
    try:
        from gradshield.training.sft import sft
    except ImportError:
        raise UsageError("training needs TRL, which is not installed: run pip install 'gradshield[train]'") from None
    # The rows carry their own mask and are cut already.
    options = {k: v for k, v in lab.recipe(task).items() if k not in ("assistant_only_loss", "max_length")}
    model: Any = loaded.model
    return sft(
        model,
        loaded.tokenizer,
        dataset,
        options,
        lab_adapter(),
        seed=seed,
        merge=True,
        progress=lambda step, total: progress(stage, step, total),
    )


def measure(model: Any, tokenizer: Any, task: str, stage: str, progress: Progress, seed: int = 0) -> EvalResult:
    """ASR by two judges of different kinds, over-refusal, and the task's own metric, all on held-out prompts.

    The attacked prompts are the lab's ``report`` split, which serves nothing else.
    """
    from gradshield.lab.judge import complied

    generate = generator(model, tokenizer, max_new_tokens=ANSWER_TOKENS)
    steps = 3
    progress(stage, 0, steps)
    phrases = RefusalPhrases()
    attacked = asr(generate, lab.requests("report")[:PROMPTS], [phrases, FunctionJudge("lab-classifier", complied)])
    progress(stage, 1, steps)
    refused = over_refusal(generate, lab.lookalikes("report")[:PROMPTS], phrases)
    progress(stage, 2, steps)
    rows = lab.utility(task, seed=seed)[:PROMPTS]
    useful = utility(generate, rows, lambda row, answer: lab.score(task, answer, row["reference"]))
    progress(stage, steps, steps)
    return EvalResult(
        {**attacked.rates, **refused.rates, **useful.rates}, (*attacked.outputs, *refused.outputs, *useful.outputs)
    )


def figures(result: EvalResult) -> dict[str, Any]:
    """The figures of an arm as the manifest holds them; ``asr`` is the refusal-phrase judge's, every judge's is in ``judges``."""
    rates: Mapping[str, Rate] = result.rates
    judges = {name.partition("/")[2]: rate.as_dict() for name, rate in rates.items() if name.startswith("asr/")}
    return {
        "asr": rates["asr/refusal-phrases"].as_dict(),
        "over_refusal": rates["over_refusal"].as_dict(),
        "utility": rates["utility"].as_dict(),
        "judges": judges,
    }
