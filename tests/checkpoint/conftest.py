"""Lets the tests here import the helper modules beside this folder (`data`, `gate`, `stores`, `fake_hub`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
