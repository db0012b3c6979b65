import pytest
import torch
from torch import nn
from torch.testing import assert_close

from riformer.train.evaluate import evaluate


class Table(nn.Module):
    """Gives the images themselves out as logits."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.flatten(1) + 0 * self.parameter


def test_counts_are_exact_and_the_mode_comes_back():
    logits, labels = torch.randn(23, 7, 1, 1), torch.randint(7, (23,))
    model = Table().train()
    result = evaluate(model, [(logits[:10], labels[:10]), (logits[10:], labels[10:])], num_classes=7)
    flat = logits.flatten(1)
    assert model.training
    assert result.num_images == 23
    assert result.top1 == pytest.approx(100 * (flat.argmax(1) == labels).float().mean().item())
    assert result.top5 == pytest.approx(100 * (flat.topk(5).indices == labels[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(flat, labels).item(), rel=1e-5)
    assert_close(result.confusion.sum(1), torch.bincount(labels, minlength=7))
    assert result.confusion[labels[0], flat[0].argmax()] > 0


def test_fewer_than_five_classes():
    result = evaluate(Table(), [(torch.eye(3)[:, :, None, None], torch.arange(3))], num_classes=3)
    assert (result.top1, result.top5) == (100, 100)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        evaluate(Table(), [], num_classes=3)
