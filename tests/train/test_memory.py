import subprocess
import sys

import pytest

WORKER = """
import resource, torch
from phyxdream.train.memory import keep_freed_memory
assert keep_freed_memory()
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)  # the heap first grows to what the loop needs
print(faults(10))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_tensors_are_not_faulted_in_again(tmp_path):
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    # Ten times 64 MiB would be 163,840 faults of 4 KiB, 320 of 2 MiB.
    assert int(done.stdout) < 100
