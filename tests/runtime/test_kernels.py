"""The Triton kernels: in triton's interpreter, and compiled for an H100 without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import images, tiny

from riformer.runtime import kernels
from riformer.runtime.optimize import optimize


@pytest.mark.slow
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


INTEGERS = ("M", "size", "num_tokens", "in_height", "in_width", "width", "pixels")
NARROW = ("x", "images", "packed", "normed", "weight", "fc1_weight", "fc2_weight")
PRODUCT = dict(C=128, ROWS=128, PRECISION="tf32")
CONSTANTS = {
    "_pack_kernel": dict(CHANNELS=3, ROOM=4, BLOCK=512),
    "_conv_kernel": PRODUCT | dict(IN=64, KERNEL=3, STRIDE=2, PADDING=1),
    "_moments_kernel": dict(C=320, COLUMNS=64),
    "_coefficients_kernel": dict(C=320, COLUMNS=512),
    "_affine_kernel": dict(C=320, ROWS=32, COLUMNS=64),
    "_mlp_kernel": PRODUCT | dict(H=512, SPANS=2, COLUMNS=128, MORE=0),
    "_pooled_kernel": dict(C=320, COLUMNS=512),
}
H100_SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("name", CONSTANTS)
def test_compiles_for_an_h100(name):
    """Every configuration, in bf16, with the tensor cores' instructions and within the shared memory. No GPU needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(kernels, name)
    tuned = hasattr(kernel, "configs")
    for config in kernel.configs if tuned else [None]:
        function = kernel.fn if tuned else kernel
        constants = CONSTANTS[name] | (config.kwargs if tuned else {})
        assert constants.keys() <= set(function.arg_names)
        types = {key: _type(key) for key in function.arg_names}
        signature = types | dict.fromkeys(constants, "constexpr")
        options = {name: getattr(config, name) for name in ("num_warps", "num_stages", "maxnreg")} if tuned else {}
        built = compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
        assert built.metadata.shared <= H100_SHARED_BYTES, f"{name} {constants}"
        assert ("wgmma.mma_async" in built.asm["ptx"]) is (name in ("_conv_kernel", "_mlp_kernel"))


def _type(argument: str) -> str:
    if argument in INTEGERS or argument.endswith("_stride"):
        return "i32"
    return "fp32" if argument == "eps" else "*bf16" if argument in NARROW else "*fp32"
