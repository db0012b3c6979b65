"""Teachers that a run takes: measured on validation images, matched by class names, and recorded."""

import dataclasses
import logging

import pytest
import timm
import torch
from train.test_loop import losses, plain

import riformer
from riformer.config import DistillConfig
from riformer.data.dataset import open_dataset
from riformer.data.orders import natural_order
from riformer.train.inputs import order_start
from riformer.train.loop import train

WORDS = tuple(str(number) for number in range(1, 13))  # natural: 1, 2, ..., 12; by code points: 1, 10, 11, 12, 2, ...


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of twelve classes, each one grey value, which any network tells apart."""
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    for number, name in enumerate(WORDS):
        (root / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (20 * number, 20 * number, 20 * number + i)).save(root / name / f"{i}.png")
    return root


class Oracle(torch.nn.Module):
    """Tells the class from the grey value; its outputs are in the order that it is given."""

    def __init__(self, order):
        super().__init__()
        self.order = list(order)
        self.num_classes = len(order)
        self.scale = torch.nn.Parameter(torch.ones(()))
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": mean, "std": std, "architecture": "oracle"}
        self.mean, self.std = mean[0], std[0]

    def forward(self, x):
        number = ((x[:, 0].mean((1, 2)) * self.std + self.mean) * 255 / 20).round().long().clamp(0, 11)
        columns = torch.tensor([self.order.index(WORDS[i]) for i in range(12)])
        return 9 * self.scale * torch.nn.functional.one_hot(columns[number], 12).float()


class Start(Oracle):
    """An oracle whose last layer is a classifier with a row for each class."""

    def __init__(self, order):
        super().__init__(WORDS)
        self.fc = torch.nn.Linear(12, 12)
        torch.nn.init.zeros_(self.fc.bias)
        self.fc.weight.data = torch.eye(12)[[WORDS.index(name) for name in order]]
        self.pretrained_cfg["classifier"] = "fc"

    def forward(self, x):
        return self.fc(super().forward(x))


def recipe(colours, teacher="oracle", **distill):
    base = plain(batch_size=24)
    data = dataclasses.replace(base.data, name=f"folder:{colours}", val_fraction=0.5)
    terms = dict(logit_teacher=teacher, label_weight=0.0, soft_weight=1.0, **distill)
    return dataclasses.replace(base, data=data, distill=DistillConfig(**terms))


@pytest.fixture
def oracle(monkeypatch):
    """Makes the name `oracle` open a teacher whose outputs have the given order and whose class names are these."""
    from riformer.distill import teachers
    from riformer.train import build

    def stand_in(order, names=()):
        model = Oracle(order)
        if names:
            model.pretrained_cfg["label_names"] = list(names)

        def build_teacher(reference, classes, mean, std, img_size=0, compile=False, opened=None, stated_classes=()):
            return teachers.build_teacher(
                reference, classes, mean, std, img_size, compile, lambda *_: model, stated_classes
            )

        monkeypatch.setattr(build, "build_teacher", build_teacher)
        monkeypatch.setattr(build, "open_model", lambda *_: model)

    return stand_in


def test_a_teacher_in_the_datas_order_is_shown_and_taught_from(tmp_path, colours, oracle, caplog):
    oracle(natural_order(WORDS))
    with caplog.at_level(logging.INFO, "riformer"):
        train(recipe(colours), tmp_path / "run")
    assert "teacher oracle: top-1 100.00 %" in caplog.text


def test_a_teacher_without_names_in_the_other_usual_order_is_refused_unless_trusted(tmp_path, colours, oracle):
    oracle(sorted(WORDS))
    with pytest.raises(ValueError, match=r"teacher oracle: its top-1 is .* but 100.00% with the order of code points"):
        train(recipe(colours), tmp_path / "run")
    train(recipe(colours, trust_teacher=True), tmp_path / "trusted")


@pytest.mark.parametrize("order", [natural_order(WORDS), sorted(WORDS), WORDS[::-1]])
def test_class_names_settle_the_order_whether_carried_or_stated(tmp_path, colours, oracle, order):
    oracle(natural_order(WORDS))
    train(recipe(colours), tmp_path / "same")
    oracle(order, names=order)
    train(recipe(colours), tmp_path / "carried")
    (tmp_path / "classes.txt").write_text("\n".join(order) + "\n")
    oracle(order)
    train(recipe(colours, teacher_classes=str(tmp_path / "classes.txt")), tmp_path / "stated")
    assert losses(tmp_path / "carried") == losses(tmp_path / "same") == losses(tmp_path / "stated")


@pytest.mark.parametrize("order", [sorted(WORDS), natural_order(WORDS), WORDS[::-1]], ids=["other", "same", "neither"])
@pytest.mark.parametrize("start", ["a file", ""])
def test_a_start_in_the_other_usual_order_is_put_into_the_datas(colours, caplog, order, start):
    begun = recipe(colours, "", start_from_teacher=False)
    begun = dataclasses.replace(begun, model=dataclasses.replace(begun.model, start=start))
    model = Start(order)
    before = model.fc.weight.clone()
    order_start(model, begun, open_dataset(begun.data))
    is_mended = bool(start) and order == sorted(WORDS)
    assert ("its top-1 is" in caplog.text and "the order of code points" in caplog.text) is is_mended
    assert torch.equal(model.fc.weight, torch.eye(12) if is_mended else before)


def test_a_teacher_near_chance_is_refused(tmp_path, colours, oracle):
    oracle([WORDS[(i + 1) % 12] for i in range(12)])
    with pytest.raises(ValueError, match=r"guessing among 12 classes gives 8\.33%"):
        train(recipe(colours), tmp_path / "run")


def test_a_teacher_that_changed_between_kill_and_resume_is_named(tmp_path):
    def write_teacher(seed):
        torch.manual_seed(seed)
        riformer.save(timm.create_model("riformer_micro", num_classes=10, img_size=8), tmp_path / "teacher")

    terms = dict(logit_teacher=str(tmp_path / "teacher"), label_weight=0.0, soft_weight=1.0, trust_teacher=True)
    learner = dataclasses.replace(plain(epochs=2), distill=DistillConfig(**terms))
    write_teacher(1)
    with pytest.raises(KeyboardInterrupt):
        train(learner, tmp_path / "run", stop_after(3))
    write_teacher(2)
    with pytest.raises(ValueError, match="teacher changed since"):
        train(learner, tmp_path / "run")


def stop_after(step):
    def progress(line):
        if line["kind"] == "step" and line["step"] == step:
            raise KeyboardInterrupt

    return progress
