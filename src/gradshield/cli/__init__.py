"""The command line: arguments to calls, errors to exit codes."""

from gradshield.cli.app import app, main

__all__ = ["app", "main"]
