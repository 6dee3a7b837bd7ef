"""`python -m bayesdl` is the `bayesdl` command."""

from __future__ import annotations

import sys

from bayesdl.cli import main

sys.exit(main())
