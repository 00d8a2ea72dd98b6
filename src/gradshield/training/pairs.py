"""TRL's ``DPOTrainer`` on pairs that are tokens already, so that what trains is what was scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from gradshield.data.batches import PAD
from gradshield.data.trl import PAIR

__all__ = ["AsTokens", "DPOTrainer"]


class AsTokens:
    """Mix-in before ``DPOTrainer`` for rows as `data.labelled` gives them.

    TRL would tokenise the words, and count every token after the prompt.
    """

    def __init__(self, *given: Any, args: Any, **more: Any) -> None:
        collator = Collator(PAD, args.max_length, args.truncation_mode, args.pad_to_multiple_of)
        super().__init__(*given, args=args, data_collator=collator, **more)  # type: ignore[call-arg]

    def _prepare_dataset(self, dataset: Any, _tokenizer: Any, args: Any, *_more: Any) -> Any:
        """The rows that still have a token to train on within ``max_length``, as TRL keeps them of other rows."""
        room = args.max_length
        kept = slice(None, room) if args.truncation_mode == "keep_start" else slice(-room if room else None, None)
        masks = zip(*(dataset[f"{name}_mask"] for name in PAIR), strict=True)
        own = [i for i, both in enumerate(masks) if any(any(mask[kept]) for mask in both)]
        return dataset if len(own) == len(dataset) else dataset.select(own)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [f"{name}_{what}" for name in PAIR for what in ("ids", "mask")]
        self._signature_columns += [f"ref_{name}_logps" for name in PAIR]


class Collator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator of pairs, with the mask of each row in place of all that follows the prompt."""

    def torch_call(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call([{**row, "prompt_ids": []} for row in examples])
        masks = [{"prompt_ids": [], **{f"{name}_ids": row[f"{name}_mask"] for name in PAIR}} for row in examples]
        batch["completion_mask"] = super().torch_call(masks)["input_ids"]  # PAD is 0: the padding does not count
        return batch
