import os
import subprocess
import sys

import pytest

CODE = """
from phyxdream.envs import opengl
opengl.egl_works()
import triton
print("both")
"""


def test_triton_may_be_imported_after_a_driver_was_loaded(gl):
    pytest.importorskip("triton")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", CODE], env=environ, capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout) == (0, "both\n"), child.stderr
