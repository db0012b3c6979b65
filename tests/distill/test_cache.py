"""The cache of teacher outputs: exact, whole rows only, of a stated size, and of one origin."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from riformer.distill import losses
from riformer.distill.cache import TeacherCache, fingerprint

IMAGES, CLASSES, AUGMENTATIONS = 20, 7, 2
ORIGIN = {"teachers": ("own",), "seed": 0}
SOME = torch.tensor([3, 0, 11, 19])


def opened(folder, top_k: int = 0, origin=ORIGIN, **sizes) -> TeacherCache:
    sizes = {"num_augmentations": AUGMENTATIONS, "num_images": IMAGES, "num_classes": CLASSES, **sizes}
    cache = TeacherCache(folder / "outputs", **sizes, top_k=top_k)
    cache.create(origin)
    cache.open()
    return cache


def outputs(seed: int = 0, n: int = len(SOME)) -> torch.Tensor:
    return 4 * torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed))


def never() -> torch.Tensor:
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("top_k", [0, 1, 3, CLASSES - 1])
def test_what_was_put_out_once_comes_back_bit_for_bit_without_the_teacher(tmp_path, top_k):
    cache = opened(tmp_path, top_k)
    first = cache.logits(1, SOME, outputs)
    assert first.dtype == torch.float32
    if not top_k:
        assert torch.equal(first, outputs())
    assert torch.equal(cache.logits(1, SOME, never), first)
    assert torch.equal(cache.logits(1, SOME.flip(0), never), first.flip(0))
    assert torch.equal(opened(tmp_path, top_k).logits(1, SOME[:2], never), first[:2])  # as after a resume
    with pytest.raises(AssertionError, match="was asked"):
        cache.logits(0, SOME, never)  # the other augmentation
    other = cache.logits(0, SOME, lambda: outputs(seed=1))
    assert (other - first).abs().max() > 0.1
    assert torch.equal(cache.logits(1, SOME, never), first)


def test_half_precision_is_widened_and_special_values_survive(tmp_path):
    cache = opened(tmp_path)
    half = outputs().bfloat16()
    half[0, :3] = torch.tensor([-0.0, float("inf"), float("-inf")])
    cache.logits(0, SOME, lambda: half)
    back = cache.logits(0, SOME, never)
    assert torch.equal(back.view(torch.int32), half.float().view(torch.int32))


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_batch_with_one_missing_row_asks_the_teacher_and_keeps_the_rows_that_were_there(tmp_path, top_k):
    cache = opened(tmp_path, top_k)
    before = cache.logits(0, SOME, outputs)
    more = torch.tensor([5, *SOME.tolist()])
    after = cache.logits(0, more, lambda: outputs(seed=9, n=5))
    assert torch.equal(after[1:], before)
    if not top_k:
        assert torch.equal(after[0], outputs(seed=9, n=5)[0])
    assert torch.equal(cache.logits(0, more, never), after)


@pytest.mark.parametrize("top_k", [1, 3, CLASSES - 1])
def test_the_largest_probabilities_are_kept_and_the_rest_is_spread_evenly(tmp_path, top_k):
    live = outputs().softmax(1)
    kept = opened(tmp_path, top_k).logits(0, SOME, outputs).softmax(1)
    assert_close(kept.sum(1), torch.ones(len(SOME)))
    assert_close(kept.argmax(1), live.argmax(1))
    for mine, full in zip(kept, live, strict=True):
        top = full.topk(top_k).indices
        assert_close(mine[top], full[top])
        rest = [i for i in range(CLASSES) if i not in top]
        assert_close(mine[rest], full[rest].mean().expand(len(rest)))


def test_a_sure_teacher_squeezed_stays_finite_and_temperature_works_on_top(tmp_path):
    sure = torch.zeros(len(SOME), CLASSES)
    sure[:, 2] = 200.0
    kept = opened(tmp_path, 2).logits(0, SOME, lambda: sure)
    assert kept.isfinite().all()
    student = outputs(seed=3)
    for temperature in (1.0, 4.0):
        expected = losses.soft(student, sure, temperature)  # whose smaller probabilities are all equal
        assert_close(losses.soft(student, kept, temperature), expected)
    assert (losses.soft(student, kept, 4.0) / losses.soft(student, kept, 1.0) - 1).abs() > 0.1


@pytest.mark.parametrize("top_k", [0, 3])
def test_any_flipped_bit_of_a_row_makes_it_missing(tmp_path, top_k):
    cache = opened(tmp_path, top_k)
    expected = cache.logits(0, SOME, outputs)
    file = tmp_path / "outputs" / "outputs.bin"
    row = cache.nbytes // (AUGMENTATIONS * IMAGES)
    for bit in range(8 * row):
        content = bytearray(file.read_bytes())
        content[3 * row + bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        cache.open()
        with pytest.raises(AssertionError, match="was asked"):
            cache.logits(0, SOME, never)
        assert torch.equal(cache.logits(0, SOME[1:], never), expected[1:])  # the others are whole
        assert torch.equal(cache.logits(0, SOME, outputs), expected)


def test_a_row_that_is_half_written_is_missing(tmp_path):
    cache = opened(tmp_path)
    file, row = tmp_path / "outputs" / "outputs.bin", cache.nbytes // (AUGMENTATIONS * IMAGES)
    empty = file.read_bytes()
    expected = cache.logits(0, SOME, outputs)
    cache.flush()
    full = file.read_bytes()
    for end in range(4, row, 4):
        file.write_bytes(full[:end] + empty[end:])  # image 0's row, cut short
        cache.open()
        with pytest.raises(AssertionError, match="was asked"):
            cache.logits(0, torch.tensor([0]), never)
    file.write_bytes(full)
    cache.open()
    assert torch.equal(cache.logits(0, SOME, never), expected)


@pytest.mark.parametrize(("top_k", "row"), [(0, 4 * CLASSES + 4), (3, 4 * 4 + 4 * 3 + 4)])
def test_the_size_is_known_before_and_taken_at_once(tmp_path, top_k, row):
    cache = TeacherCache(tmp_path / "outputs", AUGMENTATIONS, IMAGES, CLASSES, top_k)
    assert cache.nbytes == AUGMENTATIONS * IMAGES * row
    assert not (tmp_path / "outputs").exists()
    cache.create(ORIGIN)
    size = (tmp_path / "outputs" / "outputs.bin").stat()
    assert size.st_size == cache.nbytes
    assert 512 * size.st_blocks >= cache.nbytes  # no hole
    cache.open()
    for augmentation in range(AUGMENTATIONS):
        cache.logits(augmentation, torch.arange(IMAGES), lambda: outputs(n=IMAGES))
    cache.flush()
    assert (tmp_path / "outputs" / "outputs.bin").stat().st_size == cache.nbytes


def test_it_says_what_it_keeps_and_where(tmp_path):
    told = TeacherCache(tmp_path / "outputs", 2, 1000, 10).describe()
    assert told == f"1,000 images x 2 augmentations x 10 logits, 88.0 kB in {tmp_path / 'outputs'}"
    told = TeacherCache(tmp_path / "outputs", 1, 1_281_167, 1000, top_k=10).describe()
    assert told.startswith("1,281,167 images x 1 augmentation x 10 probabilities, 112.7 MB in ")


def test_a_disk_without_room_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        ValueError, match=r"no room for teacher outputs: .* 1\.3 kB in .*, where 1\.0 kB are free; lower"
    ):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    opened(tmp_path, num_augmentations=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    opened(tmp_path, num_augmentations=1)  # which has its room


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origin": {**ORIGIN, "seed": 1}}, r"\n  seed: 0 there, 1 now$"),
        ({"origin": {**ORIGIN, "teachers": ("mine",)}}, r"\n  teachers: \['own'\] there, \['mine'\] now$"),
        ({"origin": {"seed": 0}}, r"\n  teachers: \['own'\] there, None now$"),
        ({"top_k": 2}, r"\n  top_k: 0 there, 2 now$"),
        ({"num_images": 21}, r"\n  num_images: 20 there, 21 now$"),
        ({"num_augmentations": 1, "num_classes": 8}, r"\n  num_augmentations: 2 there, 1 now\n  num_classes: 7 there"),
    ],
)
def test_outputs_of_another_origin_are_refused_by_the_names_of_the_differences(tmp_path, changes, message):
    opened(tmp_path)
    opened(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds other teacher outputs; delete the folder to compute them anew:" + message
    ):
        opened(tmp_path, **changes)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    cache = opened(tmp_path)
    file = tmp_path / "outputs" / "outputs.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{cache.nbytes - 1:,} bytes there, {cache.nbytes:,} now"):
        opened(tmp_path)
    for content in ("{", "[]", "7", ""):
        (tmp_path / "outputs" / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"cannot be read .*; delete the folder"):
            opened(tmp_path)
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / ".outputs.77.tmp").mkdir()  # by a creation that was killed
    opened(tmp_path)
    assert json.loads((tmp_path / "outputs" / "manifest.json").read_text())["num_images"] == IMAGES
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.parametrize("top_k", [CLASSES, CLASSES + 1])
def test_more_probabilities_than_classes_are_refused(tmp_path, top_k):
    with pytest.raises(ValueError, match=rf"cache_top_k is {top_k}, but must be below the 7 classes"):
        opened(tmp_path, top_k)


def test_a_fingerprint_tells_weights_buffers_and_modules_apart():
    def model(last: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), last)

    base = fingerprint(model(nn.ReLU()))
    assert fingerprint(model(nn.ReLU())) == base
    assert fingerprint(model(nn.GELU())) != base
    changed = model(nn.ReLU())
    changed[1].num_batches_tracked += 1
    assert fingerprint(changed) != base
    assert fingerprint(model(nn.ReLU()).bfloat16()) != base
    filters = nn.Module()
    filters.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert len(fingerprint(filters)) == 64
