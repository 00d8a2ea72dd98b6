"""What `mkdocs build` adds to the pages in docs/: the examples as files, and the comparison on the lab as its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from gradshield.comparison import page
from gradshield.comparison.grid import Comparison
from gradshield.report import sheet

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for example in sorted((ROOT / "examples").glob("*.*")):
        files.append(File.generated(config, f"examples/{example.name}", abs_src_path=str(example)))
    path = ROOT / ".cache" / "results.html"
    path.parent.mkdir(exist_ok=True)
    sheet.write(page.page(Comparison.model_validate_json((ROOT / "docs" / "results.json").read_bytes())), path)
    files.append(File.generated(config, "results.html", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to examples: next to docs/ in the repository, inside it on the site."""
    return markdown.replace("](../examples/", "](examples/")
