"""Any fine-tuning data to tokens and back: read, render, batch, write.

formats.py    a file, a Dataset, a list -> Examples, and bad rows with their reason
raw_files.py  the kind of file, decompressed, and where each of its rows ends
records.py    a row's bytes and its value; rows of any length in bounded memory
source.py     the source of the rows, with a copy on disk, and rows made from it on access
shapes.py     the row shapes: which keys, which conversations
messages.py   chat turns as people write them, to those of a chat template
canonical.py  the bytes that a row's id is the hash of
writing.py    rows written unchanged, atomically
render.py     Example -> ids and loss mask, as TRL trains
templates.py  the choice of chat template, and the default one
fitting.py    what a template takes, and what it leaves out
spool.py      row bytes, rendered rows and values of rows, on disk
turns.py      finds assistant turns without markers
pieces.py     the text of each token, for colouring
batches.py    padded batches within a budget
trl.py        rendered rows as a dataset for TRL
"""

from gradshield.data.batches import batches, collate
from gradshield.data.formats import ReadResult, read
from gradshield.data.pieces import spans
from gradshield.data.render import RenderConfig, Renderer, RenderResult, render, render_all
from gradshield.data.shapes import SHAPES, Format
from gradshield.data.source import Examples, Rows, Source, Together
from gradshield.data.spool import Picked, Spool
from gradshield.data.templates import DEFAULT_CHAT_TEMPLATE
from gradshield.data.trl import labelled, to_trl
from gradshield.data.writing import WRITTEN, suffix, take, write, write_parts, write_quarantine

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "SHAPES",
    "WRITTEN",
    "Examples",
    "Format",
    "Picked",
    "ReadResult",
    "RenderConfig",
    "RenderResult",
    "Renderer",
    "Rows",
    "Source",
    "Spool",
    "Together",
    "batches",
    "collate",
    "labelled",
    "read",
    "render",
    "render_all",
    "spans",
    "suffix",
    "take",
    "to_trl",
    "write",
    "write_parts",
    "write_quarantine",
]
