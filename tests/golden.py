"""Figures of the original implementation (golden_original.json), on weights that a formula gives."""

import json
from pathlib import Path

GOLDEN = json.loads((Path(__file__).parent / "golden_original.json").read_text())
