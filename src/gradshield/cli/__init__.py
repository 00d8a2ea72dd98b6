"""The command line: arguments to calls, errors to exit codes; ``pipeline`` does the work."""

from gradshield.cli.app import app, main

__all__ = ["app", "main"]
