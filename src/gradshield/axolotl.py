"""A plugin for axolotl: the rows that it has tokenised are scored, and those beyond the cut are not trained on.

    plugins: [gradshield.axolotl.Plugin]
    gradshield: {threshold: "anchored:0.8"}   # optional

axolotl logs a plugin that cannot be imported and trains without it, so this module imports nothing at its top that axolotl lacks.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from gradshield.errors import UsageError

if TYPE_CHECKING:
    from gradshield.models.loading import LoadedModel
    from gradshield.types import Ints

LOG = logging.getLogger("axolotl.gradshield")  # below the logger whose lines axolotl prints
UNSUPPORTED = ("rl", "reward_model", "processor_type", "pretraining_dataset", "streaming")
COLUMNS = ("input_ids", "labels", "attention_mask")
COUNTED = ("total_num_tokens", "total_supervised_tokens", "sample_packing_eff_est")  # by axolotl, of all rows


class Settings(BaseModel, extra="forbid"):
    """The key ``gradshield`` of an axolotl config: options of ``gradshield scan``, and its folder."""

    output: str | None = None
    selector: str = "screen"
    threshold: str | None = None
    allow: Path | None = None
    fail_above: str | None = None
    probes: Path | None = None
    lookalikes: Path | None = None
    uncertified: bool = False


class Arguments(BaseModel):
    """What the plugin adds to axolotl's config."""

    gradshield: Settings | None = None


class Plugin(BasePlugin):  # type: ignore[misc]
    """Loads the datasets as axolotl does, scans them, and gives axolotl the rows that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.time()

    def get_input_args(self) -> str:
        return f"{__name__}.{Arguments.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The datasets of a training without the removed rows; None for ``axolotl preprocess``, which only tokenises.

        Raises
        ------
        GateError
            More rows are removed than ``fail_above`` allows.
        UsageError, DataError, ModelError
            As `gradshield.scan`; rows that are not those of supervised fine-tuning.
        """
        if preprocess:
            return None
        given = Settings.model_validate(dict(cfg.gradshield or {}))
        for name in UNSUPPORTED:
            if cfg.get(name):
                raise UsageError(
                    f"the GradShield plugin filters supervised fine-tuning on tokenised rows, and the config sets {name}: leave "
                    "out the plugin, and scan the files with `gradshield scan`"
                )
        from axolotl.common.datasets import TrainDatasetMeta, load_datasets
        from axolotl.utils.trainer import calculate_total_num_steps

        before = {name: cfg.get(name) for name in COUNTED}
        loaded = load_datasets(cfg=cfg)
        # Flattened, since axolotl counts tokens in the table behind the dataset.
        kept = loaded.train_dataset.select(self._kept(cfg, given, loaded.train_dataset)).flatten_indices()
        cfg.update(before)
        steps = calculate_total_num_steps(cfg, kept)
        return TrainDatasetMeta(kept, loaded.eval_dataset, min(steps, cfg.max_steps) if cfg.max_steps else steps)

    def _kept(self, cfg: Any, given: Settings, dataset: Any) -> Ints:
        """Positions of the kept rows. Of the processes of one training, the first scans and the others read its result."""
        from filelock import FileLock

        from gradshield import runs
        from gradshield.cli.options import share
        from gradshield.cli.scan import closed_gate
        from gradshield.manifests import ScanManifest
        from gradshield.scanning.cut import read_scores

        gate = share("fail_above", given.fail_above)
        folder = Path(given.output or Path(cfg.output_dir or ".") / "gradshield")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            finished = folder / "manifest.json"
            if not finished.exists() or finished.stat().st_mtime < self.began:
                _scan(cfg, given, dataset, folder)
            results = runs.read_manifest(folder, ScanManifest).results
            scores, removed, *_ = read_scores(folder)
        LOG.info(
            "GradShield: %d of %d rows removed, %d set aside, %d are trained on; report: %s",
            results.removed, results.read, results.quarantined, results.kept, folder / "report.html",
        )  # fmt: skip
        for doubt in results.doubts.values():
            LOG.warning("GradShield, not certified: %s", doubt)
        if (closed := closed_gate(results, gate)) is not None:
            raise closed
        return scores.rows[~removed]


def _scan(cfg: Any, given: Settings, dataset: Any, folder: Path) -> None:
    import torch

    import gradshield as gs
    from gradshield.cli.options import probing
    from gradshield.scanning.decide import read_ids

    columns = [name for name in COLUMNS if name in dataset.column_names]
    if columns[:2] != ["input_ids", "labels"]:
        raise UsageError(
            f"axolotl's dataset has the columns {', '.join(dataset.column_names)[:200]}, and the GradShield plugin needs "
            "input_ids and labels: let axolotl tokenise the rows (skip_prepare_dataset: false)"
        )
    gs.scan(
        dataset.select_columns(columns),
        model=_model(cfg),
        training_args={"max_length": cfg.sequence_len, "assistant_only_loss": None},
        format="tokens",
        settings=gs.ScanSettings(selector=given.selector, threshold=given.threshold),
        probing=probing(given.probes, given.lookalikes, "", {}, given.uncertified),
        allow=read_ids(given.allow, "the allow file"),
        output=folder,
        command="axolotl train",
    )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # axolotl loads its own model next


def _model(cfg: Any) -> LoadedModel:
    """The model that training starts from, with axolotl's tokenizer. Raises UsageError for tokens that it does not have."""
    import torch
    from axolotl.loaders import load_tokenizer

    from gradshield.models import loading

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "auto"
    loaded = loading.load(
        cfg.base_model, cfg.lora_model_dir, device, "auto", bool(cfg.trust_remote_code), cfg.revision_of_model
    )
    tokenizer = load_tokenizer(cfg)
    model: Any = loaded.model
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise UsageError(
            f"axolotl's tokenizer has {len(tokenizer)} tokens and the model {known}, so the new ones mean nothing to it "
            "yet: train them first, or leave tokens and special_tokens out of the config"
        )
    return replace(loaded, tokenizer=tokenizer)
