"""The script that renders typefaces makes a set that trains: by family, centred, without copies."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from scripts import load_script

from riformer.config import DataConfig
from riformer.data.dataset import open_dataset

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, STIX and Computer Modern


@pytest.fixture(scope="module")
def script():
    return load_script("tools/glyphs.py")


@pytest.fixture(scope="module")
def rendered(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["glyphs.py", str(folder), "--fonts", str(FONTS)])
        script.main()
    assert [file.name for file in folder.iterdir()] == ["glyphs.npz"]
    return folder


def test_letters_are_centred_in_one_size_and_in_order(script, rendered):
    arrays = np.load(rendered / "glyphs.npz")
    images, labels = arrays["image"], arrays["label"]
    assert images.shape[1:] == (64, 64)
    assert "".join(arrays["classes"]) == script.CLASSES
    assert labels.tolist() == list(range(34)) * (len(images) // 34)
    for image in images:
        rows, columns = np.flatnonzero(image.max(1)), np.flatnonzero(image.max(0))
        sides = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert max(sides) == 48
        assert abs(rows[0] + rows[-1] - 63) <= 1
        assert abs(columns[0] + columns[-1] - 63) <= 1


def test_a_family_is_in_one_split_and_no_face_comes_twice(script, rendered):
    arrays = np.load(rendered / "glyphs.npz")
    families, splits = arrays["family"], arrays["split"]
    names = arrays["families"].tolist()
    assert len(names) >= 4
    assert any("deja vu" in name for name in names)
    for number, name in enumerate(names):
        assert set(splits[families == number].tolist()) == {script.split_of(name)}
        assert (families == number).sum() <= 34 * script.MAX_FACES
    faces = arrays["image"].reshape(-1, 34, 64, 64)
    assert len({face.tobytes() for face in faces}) == len(faces)


def test_it_opens_as_a_data_set(rendered):
    data = open_dataset(DataConfig(name="glyphs", root=str(rendered)))
    assert len(data.classes) == 34
    assert sum(map(len, data.splits.values())) == len(np.load(rendered / "glyphs.npz")["label"])


def test_families_that_share_a_face_are_one_and_copies_are_left_out(script):
    drawn = np.random.default_rng(0).integers(0, 256, (4, 34, 16, 16), np.uint8).repeat(4, 2).repeat(4, 3)
    near = drawn[0].copy()
    near[:6] = drawn[3][:6] // 6 + near[:6] // 6 * 5  # alike, but no copy
    faces = [
        *(script.Face("beta", drawn[0]), script.Face("alpha", near), script.Face("gamma", drawn[1])),
        *(script.Face("gamma", drawn[2]), script.Face("delta", drawn[2])),
    ]
    kept = script.linked(faces)
    assert [face.family for face in kept] == ["alpha", "alpha", "delta", "delta"]
    assert [face.images is one for face, one in zip(kept, (drawn[0], near, drawn[1], drawn[2]), strict=True)]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("DejaVu Sans Mono Bold Oblique", "deja vu"),
        ("TeX Gyre Heros Condensed", "tex gyre"),
        ("Noto Serif Display Light", "noto serif"),
        ("Linux Libertine O", "linux libertine"),
        ("Bold", "bold"),
    ],
)
def test_styles_are_no_part_of_a_family(script, name, family):
    assert script.family_of(name) == family


def test_splits_are_in_proportion_and_do_not_depend_on_other_fonts(script):
    counts = np.bincount([script.split_of(f"family {i}") for i in range(4000)]) / 4000
    np.testing.assert_allclose(counts, [0.75, 0.1, 0.15], atol=0.02)


def test_boxes_and_fonts_without_letters_are_left_out(script, tmp_path, monkeypatch, capsys):
    blank = np.zeros((34, 64, 64), np.uint8)
    blank[:, 20:40, 20:40] = 255
    letters = [face for file in sorted(FONTS.glob("DejaVuS*.ttf")) if (face := script.read_face(file))]
    assert len(letters) >= 6
    kept = script.like_letters([*letters, script.Face("boxes", blank)])
    assert [face.family for face in kept] == [face.family for face in letters]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert script.read_face(tmp_path / "broken.ttf") is None
    monkeypatch.setattr(sys, "argv", ["glyphs.py", str(tmp_path), "--fonts", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "none of 1 font files has all of" in capsys.readouterr().err
