"""What `mkdocs build` adds to the pages in docs/: the examples as files, and the comparison on the lab as its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from gradshield.comparison import markdown as results

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for path in sorted((ROOT / "examples").glob("*.*")):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    page = ROOT / ".cache" / "results.html"
    page.parent.mkdir(exist_ok=True)
    results.write(json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8")), page)
    files.append(File.generated(config, "results.html", abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to examples: beside docs/ in the repository, inside it on the site."""
    return markdown.replace("](../examples/", "](examples/")
