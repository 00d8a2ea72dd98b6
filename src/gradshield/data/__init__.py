"""Any fine-tuning data to tokens and back: read, render, batch, write."""

from gradshield.data.formats import ReadResult, read, read_files
from gradshield.data.render import RenderConfig, Renderer, render_all, spans
from gradshield.data.shapes import SHAPES, Format
from gradshield.data.source import (
    WRITTEN,
    Examples,
    Source,
    suffix,
    take,
    write_parts,
    write_quarantine,
)
from gradshield.data.spool import Picked, Spool, batches, collate
from gradshield.data.trl import labelled, to_trl

__all__ = [
    "SHAPES",
    "WRITTEN",
    "Examples",
    "Format",
    "Picked",
    "ReadResult",
    "RenderConfig",
    "Renderer",
    "Source",
    "Spool",
    "batches",
    "collate",
    "labelled",
    "read",
    "read_files",
    "render_all",
    "spans",
    "suffix",
    "take",
    "to_trl",
    "write_parts",
    "write_quarantine",
]
