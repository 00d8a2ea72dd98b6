"""The stages, wired: scan.py reads from top to bottom."""
