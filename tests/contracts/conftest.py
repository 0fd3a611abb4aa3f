"""The networks and the containment check are those of tests/bounds; the small study is that of tests/search."""

import sys
from pathlib import Path

for room in ("bounds", "search"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))
