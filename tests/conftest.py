import os

import pytest

# Workers of pytest-xdist share the cores: with a thread for every core in each, OpenMP's waiting threads would take
# them from one another. Before torch is imported; programs that tests start inherit it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    # Beyond these, more workers cost memory (each holds torch and its environments) and win little.
    return min(8, os.cpu_count() or 1)
