import sys
from pathlib import Path

# Stand-ins for foreign modules must be importable by name: they are pickled.
sys.path.append(str(Path(__file__).parent))
