"""Any fine-tuning data to tokens and back: read, render, batch, write."""

from gradshield.data.batches import batches, collate
from gradshield.data.formats import ReadResult, read
from gradshield.data.pieces import spans
from gradshield.data.render import RenderConfig, Renderer, render_all
from gradshield.data.shapes import SHAPES, Format
from gradshield.data.source import Examples, Rows, Source, Together
from gradshield.data.spool import Picked, Spool
from gradshield.data.trl import labelled, to_trl
from gradshield.data.writing import WRITTEN, suffix, take, write_parts, write_quarantine

__all__ = [
    "SHAPES",
    "WRITTEN",
    "Examples",
    "Format",
    "Picked",
    "ReadResult",
    "RenderConfig",
    "Renderer",
    "Rows",
    "Source",
    "Spool",
    "Together",
    "batches",
    "collate",
    "labelled",
    "read",
    "render_all",
    "spans",
    "suffix",
    "take",
    "to_trl",
    "write_parts",
    "write_quarantine",
]
