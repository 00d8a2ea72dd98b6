"""Compare defences: grids, pooled results, their page, and the demo."""
