"""Fine-tuning: a thin wrapper over TRL's ``SFTTrainer``, and over its ``DPOTrainer`` for preference pairs.

TRL's side effects are undone, so that a model can be trained, measured and trained again in one process: the fused head that it
binds to the model's ``forward``, gradient checkpointing, dropout, the tokenizer's padding token, flags of frozen parameters, and
an unrequested output folder.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from gradshield.data.spool import PAD
from gradshield.data.templates import DEFAULT_CHAT_TEMPLATE
from gradshield.data.trl import IGNORED, PAIR, check_names, config_of
from gradshield.errors import EmptyDataError, UsageError
from gradshield.training.inside import Penalised, Selecting

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from gradshield.selectors.base import OnlineSelection
    from gradshield.training.inside import Penalty


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    peft_config: PeftConfig | None = None,
    *,
    seed: int = 0,
    merge: bool = False,
    output_dir: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    penalties: Sequence[Penalty] = (),
    online: OnlineSelection | None = None,
    finish: Callable[[Any], None] | None = None,
    resume: bool = False,
) -> PreTrainedModel | PeftModel:
    """Fine-tune a copy of ``model`` on ``dataset`` and return it, in eval mode.

    The seed is set before the adapter is created: the same arguments give the same weights, bit for bit on one CPU with the
    same number of threads. As in TRL, training sets the global random state of Python, NumPy and torch.

    Training runs on the model's device: on the CPU for a model there, even if there is an accelerator (unless ``options`` set
    ``use_cpu``; False moves the model to the first accelerator). A model on an accelerator must be on the only visible one:
    hide the others, for example with CUDA_VISIBLE_DEVICES.

    ``dataset`` holds rows in any shape that TRL knows, or tokenised rows with ``input_ids`` and ``labels`` (-100 outside the
    loss). Both are truncated at ``max_length``, and rows left without a label are dropped. Preference pairs (``chosen``,
    ``rejected``) are trained with DPO; tokenised, they have the ids of each answer after its prompt, and the mask of those that
    count (`data.labelled`). DPO's reference is the start: with an adapter that model with the adapter off, else a second one.

    ``options`` are those of ``trl.SFTConfig``, or of ``trl.DPOConfig`` for pairs, passed through; the seed and the folder are
    arguments here. The defaults are TRL's, except that nothing is printed or sent anywhere, nothing is saved without
    ``output_dir``, and training on the CPU uses the model's own precision and keeps activations. ``peft_config`` is copied,
    since TRL and PEFT modify it. ``merge`` returns the plain model with the adapter merged in, else the ``PeftModel`` is
    returned. ``output_dir`` is for TRL's checkpoints; with ``resume`` training goes on from the newest complete one there, and
    newer, incomplete ones are removed.

    ``penalties`` are added to the loss of every step, ``online`` selects rows inside training, ``finish`` is called with the
    trained model before its adapter is merged (SafeLoRA's projection).

    Raises UsageError for an option that TRL's config does not have, or a setting that it or its trainer refuses; EmptyDataError
    for no row, or no row with a label left after truncation. Warns if trainable weights are stored in half precision.
    """
    if merge and peft_config is None:
        raise UsageError(
            "merge needs an adapter to merge into the model, and there is none: pass peft_config or merge=False"
        )
    from datasets import Dataset

    rows = dataset if isinstance(dataset, Dataset) else Dataset.from_list([dict(row) for row in dataset])
    if len(rows) == 0:
        raise EmptyDataError("there is no row to train on: pass at least one")
    pairs = not {*PAIR, f"{PAIR[0]}_ids"}.isdisjoint(rows.column_names)
    for name in ("seed", "output_dir"):
        if name in options:
            raise UsageError(f"{name!r} is not a training option here: pass it as the argument {name}=")
    check_names(options, pairs)
    trained = copy.deepcopy(model)
    reference = None
    if pairs and peft_config is None:
        # TRL would load one by the name in the model's config. The model itself serves where nothing changes or moves it.
        borrowed = options.keys().isdisjoint(("sync_ref_model", "use_cpu"))
        reference = model if borrowed else copy.deepcopy(model)
    before = [_State(one) for one in (trained, reference) if one is not None]
    # transformers always creates its folder.
    place = tempfile.TemporaryDirectory(prefix="gradshield-") if output_dir is None else nullcontext(output_dir)
    with place as folder, warnings.catch_warnings():
        # A rename between PEFT, TRL and transformers, which the caller cannot act on.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        on_cpu = next(trained.parameters()).device.type == "cpu"
        config = _config(config_of(pairs), options, seed, folder, saving=output_dir is not None, on_cpu=on_cpu)
        try:
            trainer = _trainer(trained, reference, tokenizer, rows, config, copy.deepcopy(peft_config), list(callbacks))
            trainer.penalties, trainer.online = tuple(penalties), online
            _warn_of_rounding(trainer.model)
            saved = config.output_dir
            trainer.train(resume_from_checkpoint=_newest(Path(saved), config) if resume and saved else None)
            result: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
            if result is not trained:
                _unbind(result, {})
        finally:
            for state in before:
                state.restore()
    if finish is not None:
        finish(result)
    if merge:
        result = result.merge_and_unload()
        before[0].unfreeze()
    result.eval()
    return cast("PreTrainedModel | PeftModel", result)


def _trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: Any,
    peft_config: PeftConfig | None,
    callbacks: list[TrainerCallback],
) -> Any:
    """TRL's trainer with both mix-ins. Raises UsageError for settings that it refuses, EmptyDataError without a label."""
    from transformers import PrinterCallback

    more: dict[str, Any] = {}
    if isinstance(config, config_of(pairs=True)):
        from trl.trainer.dpo_trainer import DPOTrainer

        own: tuple[type, ...] = (AsTokens, DPOTrainer) if f"{PAIR[0]}_ids" in rows.column_names else (DPOTrainer,)
        more["ref_model"] = reference
    else:
        from trl.trainer.sft_trainer import SFTTrainer

        own = (SFTTrainer,)
        if _is_ready(rows, config):
            config.dataset_kwargs = {"skip_prepare_dataset": True}
    tokenizer = copy.deepcopy(tokenizer)  # TRL sets its padding token
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # as rows are scored
    kind = type("Defended", (Selecting, Penalised, *own), {})
    try:
        trainer: Any = kind(
            model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
            **more,
        )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"TRL refuses these training settings: {error}") from error
    if len(cast(Any, trainer.train_dataset)) == 0:
        raise EmptyDataError(f"no row has a token to train on within max_length={config.max_length}: raise max_length")
    trainer.remove_callback(PrinterCallback)  # transformers' substitute for its progress bar
    return trainer


def _config(kind: Any, options: Mapping[str, Any], seed: int, folder: str, saving: bool, on_cpu: bool) -> Any:
    """TRL's config with the caller's options over quiet defaults; ``on_cpu`` says where the model is."""
    on_cpu = not torch.accelerator.is_available() or bool(options.get("use_cpu", on_cpu))
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    quiet["include_num_input_tokens_seen"] = "non_padding"
    forced = {} if saving else {"save_strategy": "no"}
    if on_cpu:
        quiet |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    if "gradient_checkpointing" not in options:
        # TRL recomputes activations to save memory, which a CPU has. The present name, since TRL's old one causes a warning.
        quiet["activation_checkpointing"] = not on_cpu
    try:
        return kind(output_dir=folder, seed=seed, **(quiet | dict(options) | forced))
    except (ValueError, TypeError) as error:
        raise UsageError(f"TRL refuses these training settings: {error}") from error


def _newest(folder: Path, config: TrainingArguments) -> str | None:
    """The newest complete checkpoint in the folder; newer, incomplete ones are removed."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    steps = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    found = {int(step): path for path, step in steps.items() if step.isascii() and step.isdigit()}
    for _, path in sorted(found.items(), reverse=True):
        if _is_whole(path, config):
            return str(path)
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    return None


def _is_whole(path: Path, config: TrainingArguments) -> bool:
    """Whether the checkpoint has every file that training resumes from, and none is truncated.

    The state is written last, but a power failure may keep it without earlier files. No file is loaded: both formats show
    truncation in their header or trailer.
    """
    from safetensors import SafetensorError, safe_open

    states = [] if config.save_only_model else [path / "optimizer.pt", path / "scheduler.pt"]
    weights = [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]  # a second adapter has its own folder
    try:
        json.loads((path / "trainer_state.json").read_text("utf-8"))["global_step"]
        for index in path.glob("*.safetensors.index.json"):
            weights += [path / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()]
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return bool(weights) and all(
        zipfile.is_zipfile(file) for file in [*states, *path.glob("*.pt"), *path.glob("*.pth")]
    )


def _warn_of_rounding(model: Any) -> None:
    """Warn if steps may round to nothing; not for quantised models, whose adapters TRL keeps in half precision."""
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if half and not quantised:
        kinds = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in half))
        warnings.warn(
            f"trainable weights are stored in {kinds}, where small learning rates round to nothing: load the model in float32 "
            "(bf16=True still computes in bfloat16), or train a LoRA adapter, whose factors are float32",
            stacklevel=3,
        )


def _unbind(module: nn.Module, held: Mapping[nn.Module, Any]) -> None:
    """Restore the forward of one module, and remove accelerate's attributes.

    With them, the model or a copy would be trained again without the requested mixed precision.
    """
    own = vars(module)
    for name in ("forward", "_is_accelerate_prepared", "_original_forward"):
        own.pop(name, None)
    if module in held:
        own["forward"] = held[module]


def _is_ready(rows: Dataset, config: Any) -> bool:
    """Whether TRL's preparation would leave these rows unchanged, which takes TRL seconds to find out."""
    if not {"input_ids", "labels"} <= set(rows.column_names) or config.packing or config.shuffle_dataset:
        return False
    room = config.max_length if config.max_length is not None else float("inf")
    return all(len(labels) <= room and any(label != IGNORED for label in labels) for labels in rows["labels"])


class _State:
    """What training changes on a model besides its weights, saved to be restored."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.dropout = [(m, m.p) for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        self.forwards = {m: vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}
        vars(model).pop("_is_accelerate_prepared", None)
        self.use_cache = getattr(model.config, "use_cache", None)
        self.checkpointing = model.is_activation_checkpointing
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Restore everything but the frozen flags, which a kept adapter still needs.

        The bound ``forward`` must go: its closure points at this model, so that a deep copy would use this model's weights.
        """
        for module in self.model.modules():
            _unbind(module, self.forwards)
        for layer, p in self.dropout:
            layer.p = p
        if self.model.is_activation_checkpointing and not self.checkpointing:
            cast(Any, self.model).activation_checkpointing_disable()
        if self.use_cache is not None:
            self.model.config.use_cache = self.use_cache

    def unfreeze(self) -> None:
        """Make the weights that the adapter froze trainable again."""
        for parameter, trainable in self.trainable:
            parameter.requires_grad_(trainable)


# ---- preference pairs that are tokens already ------------------------------------------------------------------------


class AsTokens:
    """Mix-in before ``DPOTrainer`` for rows as `data.labelled` gives them, so that what trains is what was scored.

    TRL would tokenise the words, and count every token after the prompt.
    """

    def __init__(self, *given: Any, args: Any, **more: Any) -> None:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        collate = DataCollatorForPreference(PAD, args.max_length, args.truncation_mode, args.pad_to_multiple_of)
        super().__init__(*given, args=args, data_collator=partial(_collated, collate), **more)  # type: ignore[call-arg]

    def _prepare_dataset(self, dataset: Any, _tokenizer: Any, args: Any, *_more: Any) -> Any:
        """The rows that still have a token to train on within ``max_length``, as TRL keeps them of other rows."""
        room = args.max_length
        kept = slice(None, room) if args.truncation_mode == "keep_start" else slice(-room if room else None, None)
        masks = zip(*(dataset[f"{name}_mask"] for name in PAIR), strict=True)
        return dataset.select([i for i, both in enumerate(masks) if any(any(mask[kept]) for mask in both)])

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [f"{name}_{what}" for name in PAIR for what in ("ids", "mask")]
        self._signature_columns += [f"ref_{name}_logps" for name in PAIR]


def _collated(collate: Callable[[Any], dict[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """TRL's batch of pairs, with the mask of each row in place of all that follows the prompt."""
    batch = collate([{**row, "prompt_ids": []} for row in rows])
    masks = [{"prompt_ids": [], **{f"{name}_ids": row[f"{name}_mask"] for name in PAIR}} for row in rows]
    batch["completion_mask"] = collate(masks)["input_ids"]  # PAD is 0: the padding does not count
    return batch
