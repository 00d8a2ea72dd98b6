"""What a comparison leaves in ``results.json``: one model for whoever writes and whoever reads it.

``docs/schema/results.json`` is the JSON schema.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gradshield.comparison.grid import Config
from gradshield.manifests import Figures, Number, Rate, Record, Search
from gradshield.stats import Difference


class CellResult(Figures):
    """One cell of the grid with what was found: its figures, or why it ``failed``.

    ``utility_minus_clean`` is paired with a model trained on the harmless rows only. ``arm`` names the trained model, ``setting``
    is a hash of all that the cell depends on beside its name.
    """

    task: str
    harm: str
    ratio: float
    seed: int
    defence: str
    setting: str = ""
    judges: dict[str, Rate] = Field(default_factory=dict)
    rows: int | None = None
    removed: int = 0
    dropped_tokens: int = 0
    caught: Rate | None = None
    lost: Rate | None = None
    cuts: dict[str, Number] = Field(default_factory=dict)
    verified: Search | None = None
    utility_minus_clean: Difference | None = None
    arm: str | None = None
    defence_record: dict[str, Any] = Field(default_factory=dict)
    failed: str | None = None
    seconds: float = 0.0


class Cost(Record):
    """What the grid cost: cells, those that failed, models trained, and seconds over all cells and of the last run."""

    cells: int
    failed: int
    arms: int
    cell_seconds: float
    seconds_of_this_run: float


class Comparison(Record):
    """A whole comparison. ``defences`` says what each one does.

    ``recipes`` (task to training options) and ``adapter`` are those of the lab, of which ``config`` has the changes only.
    """

    command: str
    versions: dict[str, str]
    config: Config
    recipes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    adapter: dict[str, Any] = Field(default_factory=dict)
    defences: dict[str, str]
    cost: Cost
    cells: list[CellResult]
