"""Checks of Triton kernels that need no GPU: compiling them ahead of time, and running them in the interpreter."""

import inspect
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# Shared memory a block may use, by compute capability (CUDA C++ Programming Guide, table of technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, H200 and B200


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a GPU."""

    arch: int
    shared: int  # bytes a block
    registers: int  # a thread
    stack: int  # bytes a thread; more than 0 means that registers were spilled

    def assert_fits(self) -> None:
        assert self.shared <= SHARED_MEMORY[self.arch], self
        assert self.stack == 0, self


@pytest.fixture(params=sorted(SHARED_MEMORY), ids="sm_{}".format)
def compile_ahead(request, tmp_path):
    """`compile_ahead(kernel, types, num_warps) -> Resources`, once for every architecture.

    `types` maps every argument of the kernel to a Triton type ("*bf16", "i32", "fp32") or a tuple of such; anything
    else is a constexpr of that value, None included.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource.__init__).parameters:
        pytest.skip(
            f"Triton {triton.__version__} is asked in another way to compile ahead of time; 3.3 or newer is not"
        )

    def compile_kernel(kernel, types, num_warps, **options):
        constants, attributes = {}, {}

        def describe(value, *path):
            if isinstance(value, tuple):
                fields = [describe(x, *path, i) for i, x in enumerate(value)]
                return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
            if not isinstance(value, str):
                constants[path] = getattr(value, "value", value)  # of a constexpr in a tuple
                return "constexpr"
            if value.startswith("*"):
                attributes[path] = [["tt.divisibility", 16]]  # what torch's allocator guarantees
            return value

        signature = {name: describe(value, i) for i, (name, value) in enumerate(types.items())}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", request.param, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
        return Resources(request.param, compiled.metadata.shared, registers, stack)

    return compile_kernel


TRITON_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8"}


@pytest.fixture
def assert_launches_fit(request, compile_ahead):
    """`assert_launches_fit(call, module, kernel)`: every launch of that kernel that a call makes, as on such a GPU.

    The call runs on tensors without memory, and none of the module's kernels is launched.
    """

    def type_of(value):
        if isinstance(value, tuple):
            fields = map(type_of, value)
            return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
        return TRITON_TYPES[value.dtype] if isinstance(value, torch.Tensor) else value

    def check(call, module, kernel):
        launches = []

        class Recorded:
            def __init__(self, name):
                self.name = name

            def __getitem__(self, grid):
                return lambda *args, **options: launches.append((args, options)) if self.name == kernel else None

        function = getattr(module, kernel)
        with FakeTensorMode(), ExitStack() as patches:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patches.enter_context(mock.patch.object(module, name, Recorded(name)))
            processors = PROCESSORS[request.node.callspec.params["compile_ahead"]]
            patches.enter_context(mock.patch.object(module, "processors", lambda device: processors))
            call()
        seen = set()
        for given, options in launches:
            constants = {name: options.pop(name) for name in ("PHASE", "LAYER", "GRID") if name in options}
            if tuple(constants.values()) in seen:
                continue  # another step
            seen.add(tuple(constants.values()))
            types = dict(zip(function.arg_names, map(type_of, given), strict=False))
            types |= dict.fromkeys(function.do_not_specialize, "i32") | constants
            options.pop("launch_cooperative_grid", None)
            compile_ahead(function, types, **options).assert_fits()
        assert seen

    return check


@pytest.fixture
def run_interpreted(request, tmp_path):
    """`run_interpreted(function)`: a function of the test module, run where Triton's interpreter takes CPU tensors.

    The interpreter is chosen when Triton is imported, so the function runs in a Python process of its own.
    """
    pytest.importorskip("triton")

    def run(function):
        script = tmp_path / "interpreted.py"  # a file, since -c would put the current folder on the import path
        script.write_text(f"import runpy; runpy.run_path({str(request.path)!r})[{function.__name__!r}]()")
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run
