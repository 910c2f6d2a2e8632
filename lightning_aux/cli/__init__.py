"""The command `lightning-aux`: fit, validate, test and predict from YAML, and compare.

Nothing here is imported by `import lightning_aux`.
"""

from lightning_aux.cli.main import main

__all__ = ["main"]
