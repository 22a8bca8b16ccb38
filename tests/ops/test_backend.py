import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch

import phyxdream
from phyxdream import ops
from phyxdream.errors import ConfigError
from phyxdream.ops import backend
from phyxdream.ops.backend import BackendError

needs_extension = pytest.mark.skipif(backend.extension is None, reason="the compiled extension is not built")
x = torch.rand(4, 3)
arguments = ("lambda_return", x, x, x)


def chosen():
    return ops.explain(*arguments).backend


@needs_extension
def test_the_choice_follows_device_and_dtype():
    assert chosen() == "cpu"
    assert ops.explain("lambda_return", *[x.bfloat16()] * 3).backend == "reference"
    assert ops.explain("lambda_return", *[x.to("meta")] * 3).backend == "reference"


@needs_extension
def test_explain_says_why_for_every_backend():
    explanation = phyxdream.explain(ops.lambda_return, x, next_value=x, discount=x, lambda_=0.5)
    assert explanation.op == "lambda_return"
    assert set(explanation.reasons) == set(backend.BACKENDS)
    assert "SIMD" in explanation.reasons["cpu"]
    assert "not on a CUDA device" in explanation.reasons["triton"]
    assert str(explanation).startswith("lambda_return -> cpu\n")
    assert "takes torch.float32, torch.float64" in ops.explain("lambda_return", *[x.half()] * 3).reasons["cpu"]


def test_explain_checks_its_arguments():
    with pytest.raises(ConfigError, match=r"unknown op 'lambda_retrun'; did you mean 'lambda_return'\?"):
        ops.explain("lambda_retrun", x, x, x)
    with pytest.raises(ValueError, match="discount: expected the shape"):
        ops.explain(ops.lambda_return, x, x, x[:1])


@needs_extension
def test_use_backend_forces_nests_and_restores():
    with ops.use_backend("reference"):
        assert chosen() == "reference"
        with phyxdream.use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with pytest.raises(ZeroDivisionError), ops.use_backend("cpu"):
            raise ZeroDivisionError
        assert chosen() == "reference"
        assert "forced" in ops.explain(*arguments).reasons["reference"]
    assert chosen() == "cpu"


@needs_extension
def test_every_path_calls_the_backend_that_explain_names(monkeypatch):
    op = backend._ops["lambda_return"]
    calls = []
    monkeypatch.setattr(op, "reference", lambda *args: calls.append("reference") or args[0])
    with ops.use_backend("reference"):
        ops.lambda_return(x, x, x)
    ops.lambda_return(x, x, x)
    ops.lambda_return(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert calls == ["reference", "reference"]


def test_a_forced_backend_that_cannot_take_the_call_says_why():
    with ops.use_backend("triton"), pytest.raises(BackendError, match=r"'triton' was forced.*not on a CUDA device"):
        ops.lambda_return(x, x, x)
    half = x.bfloat16()
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="'cpu' was forced, but cannot take this call"):
        ops.lambda_return(half, half, half)
    with ops.use_backend("cpu"), pytest.raises(BackendError, match=r"torch\.func transform"):
        torch.vmap(ops.lambda_return)(x[None], x[None], x[None])
    assert issubclass(BackendError, ValueError)


def test_an_unknown_backend_gives_the_nearest_name():
    with pytest.raises(ConfigError, match=r"use_backend: unknown backend 'tritn'; did you mean 'triton'\?"):
        ops.use_backend("tritn")


@needs_extension
def test_threads_and_tasks_do_not_see_each_others_choice():
    seen = {}
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.setdefault("thread", chosen()))
        thread.start()
        thread.join()

    async def task(name, started, finish):
        with ops.use_backend(name):
            started.set()
            await finish.wait()
            seen[name] = chosen()

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("reference", first, second), task("cpu", second, first))

    asyncio.run(both())
    assert seen == {"thread": "cpu", "reference": "reference", "cpu": "cpu"}


def python(code, **environment):
    command = [sys.executable, "-c", "import sys; sys.path.pop(0)\n" + code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@needs_extension
def test_the_environment_variable_forces_and_use_backend_wins_over_it():
    code = """
import torch
from phyxdream import ops
x = torch.zeros(2, 2)
print(ops.explain("lambda_return", x, x, x).backend)
with ops.use_backend("cpu"):
    print(ops.explain("lambda_return", x, x, x).backend)
"""
    done = python(code, PHYXDREAM_BACKEND="reference")
    assert done.stdout.split() == ["reference", "cpu"], done.stderr


def test_an_unknown_name_in_the_environment_variable_is_an_error():
    done = python("import phyxdream.ops", PHYXDREAM_BACKEND="referense")
    assert done.returncode != 0
    assert "PHYXDREAM_BACKEND: unknown backend 'referense'; did you mean 'reference'?" in done.stderr


def test_without_the_extension_everything_runs_on_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "extension", None)
    monkeypatch.setattr(backend, "extension_problem", "the compiled extension phyxdream._C cannot be imported (test)")
    explanation = ops.explain(*arguments)
    assert explanation.backend == "reference"
    assert "phyxdream._C cannot be imported" in explanation.reasons["cpu"]
    assert ops.lambda_return(x, x, x).shape == x.shape


@needs_extension
def test_the_thread_pool_survives_a_fork():
    code = """
import os, torch
from phyxdream import ops
torch.set_num_threads(2)
x = torch.rand(64, 8192)
expected = ops.lambda_return(x, x, x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.lambda_return(x, x, x), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python(code)
    assert done.stdout.split() == ["0"], done.stderr


@needs_extension
def test_callers_in_several_threads_share_the_pool():
    big = [torch.rand(64, 8192) for _ in range(3)]
    with ops.use_backend("reference"):
        expected = ops.lambda_return(*big)
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(ops.lambda_return(*big) for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        torch.testing.assert_close(result, expected)
