import subprocess
import threading
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import images, randomised, tiny

from riformer.runtime.collapse import network_weights
from riformer.runtime.native import NativeNetwork
from riformer.runtime.parity import compare
from riformer_runtime.native import library as native
from riformer_runtime.native.library import INSTRUCTION_SETS, UnavailableError, best_products, build, supported

EMULATED = ("-include", str(Path(__file__).with_name("amx_emulated.h")))
BARS = {"fp32": 1e-5, "bf16": 3e-2, "bf16x3": 5e-5}
LARGER = [pytest.param(f"riformer_{size}", marks=pytest.mark.slow) for size in ("s24", "s36", "m36", "m48")]
VARIANTS = ["riformer_s12", *LARGER]
# Every product of every instruction set that this machine has; tiles, where it has none, in plain C++.
PRODUCTS = [(name, kind) for name in supported() for kind in INSTRUCTION_SETS[name].products]
PRODUCTS += [("amx", kind) for kind in ("bf16", "bf16x3") if "amx" not in supported() and "avx512_bf16" in supported()]

pytestmark = pytest.mark.skipif(not supported(), reason="the native network is for x86-64 with AVX2, on Linux")


def network(model, instruction_set: str, products: str) -> NativeNetwork:
    emulated = () if instruction_set in supported() else EMULATED
    return NativeNetwork(network_weights(model), instruction_set, products, *emulated)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_best_products_equal_the_training_form(name):
    model = randomised(timm.create_model(name)).eval()
    batch = images(8, 3, 101, 67)
    with torch.inference_mode():
        expected = model.double()(batch.double())
    for products in INSTRUCTION_SETS[supported()[0]].products:
        runner = network(model, supported()[0], products)
        for num in (8, 3, 1):
            report = compare(lambda _, num=num: expected[:num], runner, [batch[:num]])
            assert report.max_rel < BARS[products], f"{products}, batch {num}: {report}"
            print(f"{name} {products} batch {num}: {report}")  # noqa: T201  (pytest -rP shows it)


@pytest.mark.parametrize(("instruction_set", "products"), PRODUCTS)
@pytest.mark.parametrize(
    "args", [{}, dict(dims=(40, 64, 96, 33)), dict(num_classes=0), dict(in_chans=1), dict(mlp_ratio=2)]
)
def test_every_product_equals_the_training_form(instruction_set, products, args, two_threads):
    model = randomised(tiny(**args)).eval()
    runner = network(model, instruction_set, products)
    for num, size in ((1, (64, 64)), (3, (51, 38)), (8, (97, 66)), (40, (32, 32))):
        batch = images(num, args.get("in_chans", 3), *size)
        with torch.inference_mode():
            assert compare(model, runner, [batch]).max_rel < BARS[products], f"{num} images of {size}"


@pytest.mark.parametrize(("instruction_set", "products"), PRODUCTS)
def test_split_over_threads_and_parts_of_a_batch_changes_nothing(instruction_set, products, two_threads):
    model = randomised(tiny()).eval()
    runner = network(model, instruction_set, products)
    batch = images(6, 3, 224, 224)
    together = runner(batch)
    torch.testing.assert_close(runner(batch), together, rtol=0, atol=0)  # to the bit
    torch.set_num_threads(1)
    alone = torch.cat([runner(image) for image in batch.split(1)])
    assert (together - alone).abs().max() < BARS[products] * alone.abs().max()


@pytest.mark.parametrize("ratio", [0, 1e2, 1e3])
@pytest.mark.parametrize(("instruction_set", "products"), PRODUCTS)
def test_a_large_mean_costs_no_more_than_in_float32(instruction_set, products, ratio):
    model = randomised(tiny()).eval()
    with torch.no_grad():
        model.stem.conv.bias += ratio * model.stem(images()).std()
    with torch.inference_mode():
        exact = deepcopy(model).double()(images().double())
        plain = compare(lambda _: exact, model, [images()]).max_rel
        report = compare(lambda _: exact, network(model, instruction_set, products), [images()])
    assert report.max_rel < BARS[products] + 3 * plain


@pytest.mark.parametrize("tensor", range(8))
def test_a_wrong_tensor_shows(tensor):
    model = randomised(tiny()).eval()
    weights = network_weights(model)
    block = list(weights.stages[1][0])
    block[tensor] = torch.zeros_like(block[tensor])
    stage = (type(weights.stages[1][0])(*block), *weights.stages[1][1:])
    wrong = weights._replace(stages=(weights.stages[0], stage, *weights.stages[2:]))
    with torch.inference_mode():
        assert compare(model, NativeNetwork(wrong, supported()[0], "fp32"), [images()]).max_rel > 1e-2


@pytest.mark.parametrize("instruction_set", supported())
@pytest.mark.parametrize(("close", "bar"), [(1, 1e-6), (0, 1e-4)])
def test_gelu_is_as_close_as_promised(instruction_set, close, bar):
    x = torch.linspace(-12, 12, 1 << 20)
    y = torch.empty_like(x)
    build(instruction_set).riformer_gelu(x.data_ptr(), y.data_ptr(), len(x), close)
    assert (y - F.gelu(x.double())).abs().max() < bar
    assert (y - F.gelu(x, approximate="tanh")).abs().max() > bar  # which is another function


def test_many_threads_may_call_at_once():
    model = randomised(tiny()).eval()
    runner = network(model, supported()[0], "fp32")
    batches = [images(2, 3, size, 64, seed=size) for size in (32, 64, 80, 96)]
    expected = [runner(batch) for batch in batches]
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(batches))}

    def call(i: int) -> None:
        found[i] = [runner(batches[i]) for _ in range(20)]

    threads = [threading.Thread(target=call, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        assert len(results) == 20
        for result in results:
            torch.testing.assert_close(result, expected[i], rtol=0, atol=0)


def test_layouts_and_types_of_images():
    runner = network(randomised(tiny()).eval(), supported()[0], "fp32")
    expected = runner(images())
    torch.testing.assert_close(runner(images().to(memory_format=torch.channels_last)), expected, rtol=0, atol=0)
    torch.testing.assert_close(runner(images().double()), expected, rtol=0, atol=0)
    assert runner(images()[:0]).shape == (0, 5)


def test_bad_images_are_named():
    runner = network(tiny(), supported()[0], "fp32")
    with pytest.raises(ValueError, match=r"\[2, 1, 64, 64\].*\[N, 3, H, W\]"):
        runner(images(2, 1, 64, 64))
    with pytest.raises(ValueError, match="2 x 64 pixels are too small"):
        runner(images(1, 3, 2, 64))


def test_without_a_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnavailableError, match=r"install g\+\+"):
        build.__wrapped__(supported()[0])


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"does not compile.*no-such-option"):
        build.__wrapped__(supported()[0], "-fno-such-option")
    assert not list(tmp_path.rglob("*.so"))
    assert not list((tmp_path / "riformer").iterdir())


def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.__wrapped__("avx2")
    (library,) = tmp_path.rglob("*.so")
    compiled = library.stat()
    build.__wrapped__("avx2")
    assert [library.stat().st_mtime_ns] == [compiled.st_mtime_ns for _ in tmp_path.rglob("*.so")]


def test_a_precision_is_a_floor(monkeypatch):
    for best, precision, expected in (
        ("amx", "bf16x3", "bf16x3"),
        ("avx512_bf16", "bf16", "bf16"),
        ("avx512_bf16", "bf16x3", "fp32"),
        ("avx2", "bf16", "fp32"),
    ):
        monkeypatch.setattr(native, "supported", lambda best=best: (best,))
        assert best_products(precision) == (best, expected)
    monkeypatch.setattr(native, "supported", lambda: ())
    with pytest.raises(UnavailableError, match="avx2 and fma"):
        best_products("fp32")


def test_every_instruction_set_compiles():
    """Also those that this machine cannot run."""
    names = list(INSTRUCTION_SETS)
    assert names
    for name in names:
        command = ["c++", *native.flags(name), "-Wall", "-fsyntax-only"]
        done = subprocess.run([*command, str(native.SOURCES[0])], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
