"""What the benchmarks share; each program beside this folder answers one question.

Importing it puts the checkout's own package on the path, before an installed one.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))
