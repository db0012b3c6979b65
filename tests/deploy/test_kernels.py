"""The Triton kernels: in triton's interpreter, and compiled for an H100 without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import images, tiny

from riformer.deploy import kernels
from riformer.deploy.runtime import optimize


def test_in_the_interpreter():
    file = Path(__file__).with_name("kernels_in_interpreter.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


def test_optimize_names_the_device_that_it_lacks():
    with pytest.raises(ValueError, match="'triton' has no bf16 on cpu; this is what native, portable have"):
        optimize(tiny(), images(), "bf16", "triton")


TYPES = dict(M="i32", tiles="i32", num_tokens="i32", C="i32", H="i32", centre_stride="i32", eps="fp32")
NARROW = ("x", "hidden", "weight", "fc1_weight", "fc2_weight")
H100_SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("name", ["_sums_kernel", "_coefficients_kernel", "_fc1_kernel", "_fc2_kernel", "_mlp_kernel"])
def test_compiles_for_an_h100(name):
    """Every configuration, in bf16, with the tensor cores' instructions and within the shared memory. No GPU needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(kernels, name)
    tuned = hasattr(kernel, "configs")
    for config in kernel.configs if tuned else [None]:
        function = kernel.fn if tuned else kernel
        constants = dict(SPANS=2, ROWS=128, PRECISION="tf32", COLUMNS=128) | (config.kwargs if tuned else {})
        constants = {key: value for key, value in constants.items() if key in function.arg_names}
        types = {key: TYPES.get(key, "*bf16" if key in NARROW else "*fp32") for key in function.arg_names}
        signature = types | dict.fromkeys(constants, "constexpr")
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages) if tuned else {}
        built = compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
        assert built.metadata.shared <= H100_SHARED_BYTES, f"{name} {constants}"
        assert ("wgmma.mma_async" in built.asm["ptx"]) is tuned
