"""The section of a dataset's card: what was screened, what went, whether the scan is certified, and every hash."""

from __future__ import annotations

from pathlib import Path

from gradshield.files import file_digest
from gradshield.manifests import ScanManifest
from gradshield.report.markdown import BEGIN, END, code, plain, put_section, table_row, table_rule

# So that the hub shows the rows that stay, and not those that went.
FRONT = "---\nconfigs:\n- config_name: default\n  data_files: {kept}\n---\n"
VERSIONS = ("gradshield", "torch", "transformers")


def write(folder: Path, manifest: ScanManifest, kept: Path) -> None:
    """Put the section into ``README.md`` of the folder, in place of an earlier one; the rest of the file is kept."""
    put_section(folder / "README.md", section(manifest, kept), FRONT.format(kept=kept.name))


def section(manifest: ScanManifest, kept: Path) -> str:
    """The section as Markdown; of paths only the last part, since a card is published."""
    results, data, model = manifest.results, manifest.data, manifest.model
    counts = f"{results.removed:,} of {results.read:,} rows removed, {results.kept:,} kept"
    counts += f", {results.quarantined:,} set aside as unusable" if results.quarantined else ""
    counts += f", {results.cleared:,} of the kept ones cleared by a reviewer" if results.cleared else ""
    counts += f", {results.denied:,} of the removed ones taken out by a reviewer" if results.denied else ""
    cuts = "; ".join(
        f"{plain(cut.rule)}, score above {cut.value:.6g}" + (f" ({plain(name)})" if name != "rows" else "")
        for name, cut in results.cuts.items()
    )
    verdict = (
        "**Certified**: no check speaks against the scan."
        if results.certified
        else f"**Not certified**: {plain('; '.join(results.doubts.values()))}."
    )
    kinds = ", ".join(f"{plain(name)} {count:,}" for name, count in results.categories.items() if name)
    hashes = [
        ("input", data.name, data.sha256),
        ("kept", kept.name, file_digest(kept)),
        ("model", model.name, model.sha256),
    ]
    versions = ", ".join(f"{name} {manifest.versions[name]}" for name in VERSIONS if name in manifest.versions)
    lines = [
        BEGIN,
        "## Safety screening",
        "",
        f"Screened with GradShield, selector {code(manifest.settings.selector)}, for rows that would make the model less safe: "
        f"{counts}.",
        f"Removed: {cuts or 'nothing could be cut'}.",
        *([f"Nearest kinds of harm, a guess: {kinds}."] if kinds else []),
        "",
        f"{verdict} A certified scan is one whose own checks passed; no scan finds every harmful row.",
        "",
        table_row("", "name", "SHA-256"),
        table_rule(3),
        *(table_row(label, code(Path(name).name), code(digest)) for label, name, digest in hashes),
        "",
        f"Seed {manifest.settings.seed}; {plain(versions)}. Everything else is in `manifest.json`.",
        END,
    ]
    return "\n".join(lines)
