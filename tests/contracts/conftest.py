"""The networks and the containment check are those of tests/bounds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bounds"))
