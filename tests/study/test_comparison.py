"""What a ladder's records say: means, paired differences and their intervals, convergence, the gap that is closed."""

import dataclasses

import pytest
from scipy.stats import t, ttest_rel

from riformer.measure.quoted import LADDER
from riformer.recipes import RECIPES, RUNGS, at_budget, quickstart
from riformer.study.comparison import STEPS, T_QUANTILES, Comparison, Difference, markdown, record, split_name
from riformer.study.ladder import run_ladder


def one(ladder: str, rung: str, seed: int, top1: float, steps: int = 100, **more) -> dict:
    images = {"split": "test", "num_images": 500, "recipe": {"data": {"name": "digits"}, "seed": seed}}
    named = {"ladder": ladder, "rung": rung, "seed": seed, "run": f"{ladder}-{rung}-seed{seed}"}
    return {**named, "steps": steps, "top1": {"deploy": top1}, **images, **more}


def study(scores: dict[tuple[str, str], list[float]]) -> Comparison:
    steps = {"a-1x": 100, "a-4x": 400}
    return Comparison(
        one(ladder, rung, seed, top1, steps[ladder])
        for (ladder, rung), values in scores.items()
        for seed, top1 in enumerate(values)
    )


def test_students_quantiles():
    assert list(T_QUANTILES) == [round(float(t.ppf(0.975, df)), 3) for df in range(1, len(T_QUANTILES) + 1)]


@pytest.mark.parametrize("num", [2, 3, 5, 21, 22, 40])
def test_an_interval_is_students(num):
    first = [90 + (7 * i % 5) / 3 for i in range(num)]
    second = [91 + (11 * i % 7) / 2 for i in range(num)]
    found = Difference({i: b - a for i, (a, b) in enumerate(zip(first, second, strict=True))})
    low, high = ttest_rel(second, first).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low, abs=2e-3)
    assert found.mean + found.half == pytest.approx(high, abs=2e-3)


def test_a_difference_says_whether_it_is_clear():
    assert str(Difference({0: 1.0})) == "+1.00 (1 seed)"
    assert not Difference({0: 1.0}).is_clear
    clear = Difference({0: 1.0, 1: 1.5, 2: 1.5})
    assert str(clear) == "+1.33 [+0.62, +2.05]"
    assert clear.is_clear
    assert not Difference({0: -1.0, 1: 1.5, 2: 1.5}).is_clear


@pytest.mark.parametrize("rung", RUNGS)
def test_a_recipes_name_tells_ladder_and_rung(rung):
    base = at_budget(RECIPES["glyphs-riformer"](), 3)
    assert split_name(RUNGS[rung](base).name) == ("glyphs-riformer-3x", rung)


def test_every_step_is_between_rungs():
    assert {rung for step in STEPS for rung in step} <= RUNGS.keys()
    assert LADDER.keys() <= RUNGS.keys()


def test_differences_are_paired_by_seed_and_tables_show_them():
    scores = {
        ("a-1x", "identity"): [80.0, 82.0, 90.0],
        ("a-1x", "soft"): [81.0, 83.5, 91.5, 50.0],
        ("a-1x", "mixer"): [95.0],
        ("a-4x", "soft"): [95.0, 96.0],
    }
    lines = markdown(study(scores), LADDER).splitlines()
    assert "|  | paper | 100 steps | 400 steps |" in lines
    assert "| identity | 72.31 | 84.00 ± 5.29 (3 seeds) |  |" in lines
    assert "| soft | 74.05 | 76.50 ± 18.23 (4 seeds) | 95.50 ± 0.71 (2 seeds) |" in lines
    assert "| identity → soft | +1.74 | +1.33 [+0.62, +2.05] |  |" in lines
    assert "| identity → mixer | +2.70 | +15.00 (1 seed) |  |" in lines


FOUND = {"mixer": [96.0, 96.4], "full": [93.0, 93.0], "mixer-last": [95.5, 95.5]}


@pytest.mark.parametrize(
    ("last", "word"),
    [(89.0, "below the 0.3 that count as converged"), (96.0, "above 0.3, so that this has not converged")],
)
def test_the_headline_names_gap_share_and_convergence(last, word):
    found = study(
        {
            ("a-1x", "deleted"): [88.0, 90.0],
            ("a-4x", "deleted"): [90.0, last],
            **{("a-4x", rung): values for rung, values in FOUND.items()},
        }
    )
    verdict, budget = found.headline()
    gains = Difference({0: (90 - 88) / 2, 1: (last - 90) / 2})  # 100 to 400 steps are two doublings
    assert "After 400 steps on digits, the full recipe is 3.20 points behind the network" in verdict
    worth = {name: Difference({0: top1 - 90, 1: other - last}) for name, (top1, other) in FOUND.items()}
    expected = (
        f"Mixers are worth {worth['mixer']} points to labels alone; the full recipe without them {worth['full']}, "
    )
    assert expected + f"mixer-last {worth['mixer-last']}." in verdict
    assert f"Between 100 and 400 steps each doubling adds {gains} points to labels alone" in budget
    assert word in budget


def test_the_headline_tells_each_budget_and_needs_two_for_convergence():
    found = study({("a-1x", "full"): [80.0, 81.0], ("a-1x", "mixer"): [90.0, 92.0], ("a-4x", "full"): [89.0]})
    assert [text[:18] for text in found.headline()] == ["After 100 steps on"]
    found = study({(name, rung): [90.0, 92.0] for name in ("a-1x", "a-4x") for rung in ("full", "mixer")})
    assert [text[:18] for text in found.headline()] == ["After 400 steps on", "After 100 steps on"]
    same = Comparison(one(name, "deleted", 0, 90.0) for name in ("q", "q-1x"))
    assert same.gain_of_doubling("deleted") is None


def test_runs_on_other_images_are_not_compared():
    other = {**one("a-1x", "soft", 0, 90.0), "num_images": 400}
    with pytest.raises(ValueError, match="runs on the same images"):
        Comparison([one("a-1x", "soft", 0, 90.0), other])
    with pytest.raises(ValueError, match="runs on the same images"):
        Comparison([])


def test_runs_of_one_rung_differ_in_their_seed_alone():
    first = one("a-1x", "soft", 0, 90.0)
    with pytest.raises(ValueError, match="a-1x-soft-seed0 and elsewhere are the same rung, ladder and seed"):
        Comparison([first, {**first, "run": "elsewhere"}])
    other = one("a-1x", "soft", 1, 90.0)
    with pytest.raises(ValueError, match="a-1x-soft-seed1 has other settings than the same rung with other seeds"):
        Comparison([first, {**other, "recipe": {**other["recipe"], "optim": {"lr": 2}}}])
    Comparison([first, other])


def test_a_record_tells_whether_a_run_learned_the_same(tmp_path):
    base = quickstart()
    base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=1, warmup_epochs=0, batch_size=250))
    recipes = [dataclasses.replace(RUNGS["deleted"](base), seed=seed) for seed in (0, 1)]
    first, other = run_ladder(recipes, tmp_path / "first", lambda line: None)
    (again,) = run_ladder(recipes[:1], tmp_path / "again", lambda line: None)
    kept = record(first)
    assert (kept["ladder"], kept["rung"], kept["seed"], kept["steps"]) == ("quickstart", "deleted", 0, 4)
    assert kept["recipe"]["data"]["root"] == ""
    assert len(kept["val_top1"]) == 1
    assert record(again)["losses_sha256"] == kept["losses_sha256"] != record(other)["losses_sha256"]
    (again.path / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="is not finished: give its command again"):
        record(again)
