"""The output of ``gradshield scan --dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradshield.cli.common import out, plain, read_as
from gradshield.report.text import duration

if TYPE_CHECKING:
    from gradshield.scanning.estimate import Estimate

REASONS = 5  # printed one by one; the rest are counted


def print_estimate(found: Estimate) -> None:
    out.print(f"rows       [bold]{found.scored:,}[/bold] of {found.rows:,} can be scored")
    read_as(found.read_as)
    for reason, line, count in found.unusable[:REASONS]:
        out.print(f"           {count:,} cannot: {plain(reason)} [dim](first: line {line})[/dim]")
    if others := sum(count for _, _, count in found.unusable[REASONS:]):
        out.print(f"           {others:,} cannot, for other reasons")
    share = 100 * found.loss_tokens / found.tokens
    out.print(f"tokens     {found.tokens:,}, {share:.0f} % of them in the loss; the longest row has {found.longest:,}")
    if found.engine:
        out.print(f"engine     {plain(found.engine)}")
    whole, low, high = found.seconds.value, found.seconds.low, found.seconds.high
    spread = f" [dim]({duration(low)} to {duration(high)})[/dim]" if high > low else ""
    out.print(f"time       [bold]{duration(whole)}[/bold]{spread} to measure, {duration(found.before)} before it")
    out.print(
        f"           [dim]timed on {found.sampled_rows:,} rows, {found.sampled} of {found.shards} shards; "
        f"{found.scored / whole:,.0f} rows a second[/dim]"
    )
    if found.memory:
        out.print(f"memory     {found.memory / 2**30:.1f} GiB at most")
