"""`python -m lightning_aux.cli` is the command `lightning-aux`."""

import sys

from lightning_aux.cli.main import main

sys.exit(main())
