"""Refuses releases of Lightning that were malicious uploads, before anything imports them.

2.6.2 and 2.6.3 stole credentials when they were imported. The requirement of this package excludes
them; an environment may hold one all the same.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

MALICIOUS = {"2.6.2", "2.6.3"}


def refuse_malicious_releases() -> None:
    """Look at what is installed, without importing it.

    Raises:
        ImportError: it is one of the malicious releases.
    """
    for name in ("lightning", "pytorch-lightning"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed in MALICIOUS:
            raise ImportError(
                f"{name} {installed} was a malicious upload that steals credentials when it is "
                f"imported. Uninstall it, change the credentials that this machine knows, and "
                f"install {name}>=2.6.6."
            )


refuse_malicious_releases()
