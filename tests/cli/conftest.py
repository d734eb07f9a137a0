"""Lets the tests here import `data`, the makers of small checkpoints."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
