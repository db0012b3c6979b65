"""The page about measured speed: what it computes from bench results, and that quoted numbers are marked as quoted."""

import copy
import re
import sys

import pytest
from run_folders import make_bench, speed_report_of, spread

from riformer import cli
from riformer.measure.quoted import QUOTED
from riformer.pages.speed import best, pareto, read_bench, write_speed_report

ENGINES = (
    *(("riformer_s12", "eager", "fp32", 15.0), ("riformer_s12", "openvino", "bf16", 40.0)),
    *(("riformer_s12", "openvino", "int8", 44.0), ("riformer_s12", "ours", "bf16", 51.0)),
)
NETWORKS = (
    *(("resnet50", "openvino", "bf16", 14.0), ("riformer_s12:mixer=pooling", "openvino", "bf16", 35.0)),
    *(("riformer_s12", "openvino", "bf16", 40.0), ("riformer_s24", "openvino", "bf16", 21.0)),
    *(("riformer_s12", "ours", "bf16", 51.0), ("riformer_s24", "ours", "bf16", 26.0), ("vgg11", "eager", "fp32", 4.0)),
)


def cells_of(page, label):
    row = re.search(rf'<th scope="row">{re.escape(label)}</th>(.*?)</tr>', page, re.DOTALL)[1]
    return [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)]


def test_every_row_stands_beside_its_error_and_its_limit(tmp_path):
    page = speed_report_of(make_bench(tmp_path / "cpu.json", *ENGINES, batch_sizes=(1, 8)))
    rate, ratio, alone, peak, size, macs, error, same = cells_of(page, "ours bf16")
    assert rate == "51 50 to 52.5"
    assert ratio.startswith("3.40×")
    assert (alone, peak, size, macs, error, same) == ("90 %", "81 %", "22.9", "1.80 G", "2e-03", "88 %")
    assert cells_of(page, "openvino int8")[2:4] == ["–", "–"]
    assert page.count("<h3>Batch") == 2
    assert "Testcore &lt;9000&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page)  # one file that needs no other
    assert "<script" not in page


def test_the_headline_is_the_largest_lead_of_the_first_network_that_runs_on_ours(tmp_path):
    bench = read_bench(make_bench(tmp_path / "bench.json", *ENGINES))
    other = copy.deepcopy(bench.groups[0])
    other["batch_size"] = 1
    other["rows"][1]["images_per_s"], other["rows"][1]["rates"] = spread(90.0), [90.0, 60.0, 900.0]
    bench.groups.append(other)
    group, fastest, first, ratio = best(bench)
    assert (group["batch_size"], fastest["backend"], first["backend"], ratio) == (1, "openvino", "eager", 6)
    page = speed_report_of(tmp_path / "bench.json")
    assert "Fastest on RIFormer-S12: <strong>ours bf16</strong>, 3.40 times eager fp32" in page
    page = speed_report_of(make_bench(tmp_path / "peers.json", *NETWORKS))
    assert "Fastest on RIFormer-S12: <strong>ours bf16</strong>, 1.27 times openvino bf16" in page


def test_accuracies_are_quoted_with_their_sources_and_only_where_they_were_published(tmp_path):
    page = speed_report_of(make_bench(tmp_path / "peers.json", *NETWORKS))
    assert cells_of(page, "RIFormer-S12, ours bf16")[:2] == ["76.90", "4,900"]
    assert cells_of(page, "RSB-ResNet-50, openvino bf16")[:2] == ["79.80", "2,733"]
    assert cells_of(page, "vgg11, eager fp32")[:2] == ["–", "–"]
    for name in ("riformer_s12", "riformer_s12:mixer=pooling", "resnet50"):
        assert QUOTED[name].source in page
    assert QUOTED["convnext_tiny"].source not in page
    assert "not reproduced" in page
    assert "Pareto line" in page
    large = speed_report_of(make_bench(tmp_path / "large.json", *NETWORKS, img_size=384))
    assert "Pareto line" not in large
    assert "quoted<" not in large


def test_quoted_numbers_are_those_of_the_published_recipes():
    from riformer.recipes import RECIPES

    checked = 0
    for key, quote in QUOTED.items():
        size = key.removeprefix("riformer_").removesuffix(":mixer=pooling")
        recipe = {"RIFormer": size, "PoolFormer": f"poolformer-{size}", "GFNet": key.replace("_", "-")}.get(
            quote.family
        )
        if recipe in RECIPES:
            assert float(re.search(r"top-1 ([\d.]+\d)", RECIPES[recipe].__doc__)[1]) == quote.top1
            checked += 1
    assert checked == 9


def test_the_pareto_line_holds_what_nothing_beats_in_both():
    assert pareto([(1, 5), (2, 4), (3, 4), (2, 5), (0.5, 6), (0.4, 5.5)]) == [(3, 4), (2, 5), (0.5, 6)]


def test_the_verb_tells_files_from_runs(tmp_path, capsys):
    file = make_bench(tmp_path / "bench.json", *ENGINES)
    assert cli.run("report", [str(file)]) == 0
    assert "RIFormer speed report" in (tmp_path / "bench.html").read_text()
    (tmp_path / "run").mkdir()
    assert cli.run("report", [str(file), str(tmp_path / "run")]) == 1
    assert "make two reports" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other", "groups": []}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is no result of `riformer bench --out`"):
        write_speed_report([tmp_path / "other.json"], tmp_path / "page.html")
    (tmp_path / "begun.json").write_text('{"kind": "bench", "groups": []}')
    with pytest.raises(ValueError, match="no finished group yet"):
        read_bench(tmp_path / "begun.json")
    assert not (tmp_path / "page.html").exists()


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeError, match=r"pip install 'riformer\[report\]'"):
        write_speed_report([make_bench(tmp_path / "bench.json", *ENGINES)], tmp_path / "page.html")
