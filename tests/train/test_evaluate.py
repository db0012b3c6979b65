"""Accuracy: exact counts, over processes too, and memory that does not grow with the square of the classes."""

import os
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from riformer.train.evaluate import evaluate


class Table(nn.Module):
    """Returns the images themselves as logits."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.flatten(1) + 0 * self.parameter


def logits_and_labels(num_images=23, num_classes=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, num_classes, 1, 1, generator=generator)
    return logits, torch.randint(num_classes, (num_images,), generator=generator)


def dense(confusion, num_classes):
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for true, row in confusion.items():
        for predicted, count in row.items():
            matrix[true, predicted] = count
    return matrix


def test_counts_are_exact_and_the_mode_comes_back():
    logits, labels = logits_and_labels()
    model = Table().train()
    result = evaluate(model, [(logits[:10], labels[:10]), (logits[10:], labels[10:])], num_classes=7)
    flat = logits.flatten(1)
    assert model.training
    assert result.num_images == 23
    assert result.finite
    assert result.top1 == pytest.approx(100 * (flat.argmax(1) == labels).float().mean().item())
    assert result.top5 == pytest.approx(100 * (flat.topk(5).indices == labels[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(flat, labels).item(), rel=1e-5)
    expected = torch.zeros(7, 7, dtype=torch.int64).index_put_((labels, flat.argmax(1)), torch.tensor(1), True)
    assert_close(dense(result.confusion, 7), expected)


def test_fewer_than_five_classes():
    result = evaluate(Table(), [(torch.eye(3)[:, :, None, None], torch.arange(3))], num_classes=3)
    assert (result.top1, result.top5) == (100, 100)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        evaluate(Table(), [], num_classes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_never_an_answer(value):
    """Without the check NaN logits are class 0, and of a set with many of that class the accuracy looks fine."""
    logits, labels = torch.zeros(4, 6, 1, 1), torch.zeros(4, dtype=torch.int64)
    logits[:, 0] = 1
    logits[2, 0] = value
    result = evaluate(Table(), [(logits, labels)], num_classes=6)
    assert (result.top1, result.top5, result.num_nonfinite, result.finite) == (75, 75, 1, False)
    assert result.confusion == {0: {0: 3}}


def test_confusion_of_many_classes_is_as_large_as_its_images():
    """The square of a million classes would not fit into any memory."""
    num_classes = 1_000_000
    labels = torch.tensor([999_999, 5])
    logits = torch.zeros(2, num_classes, 1, 1)
    logits[[0, 1], [999_999, 7]] = 1
    result = evaluate(Table(), [(logits, labels)], num_classes)
    assert result.confusion == {5: {7: 1}, 999_999: {999_999: 1}}
    assert (result.top1, result.num_images) == (50, 2)


def evaluate_share(rank, store, sending):
    """Three of four images on the first process, the last one on the second."""
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, labels = logits_and_labels(4)
    logits[1] = torch.nan
    own = slice(0, 3) if rank == 0 else slice(3, 4)
    result = evaluate(Table(), [(logits[own], labels[own])], num_classes=7)
    sending.send((result.top1, result.top5, result.num_images, result.num_nonfinite, result.confusion))
    dist.destroy_process_group()


def test_two_processes_with_unequal_shares_count_as_one(tmp_path):
    logits, labels = logits_and_labels(4)
    logits[1] = torch.nan
    alone = evaluate(Table(), [(logits, labels)], num_classes=7)
    server = get_context("forkserver")
    pipes = [server.Pipe(duplex=False) for _ in range(2)]
    processes = [
        server.Process(target=evaluate_share, args=(rank, tmp_path / "store", sending))
        for rank, (_, sending) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = [receiving.recv() for receiving, _ in pipes if receiving.poll(60)]
    for process in processes:
        process.join()
    expected = (alone.top1, alone.top5, 4, 1, alone.confusion)
    assert results == [expected, expected]
