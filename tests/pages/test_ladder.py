"""The page about a ladder: whole, from run folders, with every figure; and where a token looks."""

import re

import pytest
import torch
from run_folders import small_ladder
from tiny import tiny
from torch.testing import assert_close

from riformer.pages.ladder import receptive_field, write_ladder_report

pytestmark = pytest.mark.usefixtures("_few_digits")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    for times, rungs in ((1, ("mixer", "deleted", "full")), (2, ("mixer", "full"))):
        small_ladder(folder, rungs, times, seeds=(0, 1))
    return folder


def test_the_page_holds_every_rung_budget_figure_and_run(tmp_path, runs):
    page = write_ladder_report([runs], tmp_path / "ladder.html").read_text()
    assert page.count("<svg") == 6
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    for word in ("2 steps", "4 steps", "quickstart-1x-deleted-seed1", "quickstart-2x-seed0", "75.36"):
        assert word in page
    assert "full → mixer" in page
    assert "the full recipe is" in page
    for name in ("steps", "curves", "forest", "latency", "features", "fields"):
        assert f'id="{name}-' in page
    assert not {"{{", "nan", "None"} & set(re.findall(r"\{\{|\bnan\b|\bNone\b", page))


def test_an_unfinished_run_is_left_out_and_a_folder_without_runs_refused(tmp_path, runs):
    (runs / "quickstart-1x-deleted-seed1" / "evaluation.json").rename(tmp_path / "kept.json")
    page = write_ladder_report([runs], tmp_path / "ladder.html").read_text()
    (tmp_path / "kept.json").rename(runs / "quickstart-1x-deleted-seed1" / "evaluation.json")
    assert "quickstart-1x-deleted-seed1" not in page
    assert "quickstart-1x-deleted-seed0" in page
    with pytest.raises(ValueError, match="no run in"):
        write_ladder_report([tmp_path / "nothing"], tmp_path / "ladder.html")


def test_a_token_without_mixing_looks_at_its_patches_alone():
    """Two stages of kernels 4/4 and 2/2: the middle one of four by four tokens sees eight pixels by eight."""
    args = dict(depths=(1, 1), dims=(8, 16), stem_patch=4, stem_stride=4, down_patch=2, img_size=32)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tiny(mixer="affine", **args).eval()
    field = receptive_field(model, images)
    inside = torch.zeros(32, 32)
    inside[16:24, 16:24] = 1
    assert_close((field > 0).float(), inside)
    assert (receptive_field(tiny(mixer="token_matrix", **args).eval(), images) > 0).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
