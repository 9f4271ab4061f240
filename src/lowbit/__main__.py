"""``python -m lowbit``."""

from __future__ import annotations

import sys

from lowbit.cli import main

sys.exit(main())
