"""Small diffusers folders are made by the same code as for the tests of import and export."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "formats"))
