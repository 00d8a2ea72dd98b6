"""Defences next to each other: grids, pooled results, their page, and the demo."""
