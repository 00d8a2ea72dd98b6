"""Score rows by an unsafety score of your own: any function of (model, batch) to one differentiable scalar.

Here S is the log-odds that the answer does not begin with "I", whatever else it begins with. Runs on a CPU in under a
minute with the bundled lab model: python examples/own_probe.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradshield as gs
from gradshield import lab
from gradshield.probes import PromptBatch, first_logits, first_token


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    refusing = first_token(tokenizer, "I")

    def not_refusing(model: nn.Module, batch: PromptBatch) -> Tensor:
        """Rises as the model leaves refusal. Logits, not probabilities: those saturate on a model that is sure."""
        logits = first_logits(model, batch)  # (B, V)
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[refusing] = False
        return (logits[:, others].logsumexp(-1) - logits[:, refusing]).mean()

    rows, labels = lab.mix("choice", harm="explicit", ratio=0.1, n=90)
    selection = gs.scan(
        rows,
        model=model,
        tokenizer=tokenizer,
        settings=gs.ScanSettings(probe=not_refusing),
        probing=gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction")),
        labels=labels,  # measured, never used to decide
    )
    found = selection.manifest.results.labels
    for name, rate in (("caught", found.caught), ("lost", found.lost)):
        print(f"{name:7} {rate.k} of {rate.n} ({rate.low:.0%} to {rate.high:.0%})")
    for score in (one for one in found.aurocs if one.auroc is not None):
        print(f"AUROC {score.auroc:.3f}  {score.name}")


if __name__ == "__main__":
    main()
