"""The report counts, names and stops in time, and not by bad luck."""

import numpy as np
import pytest

from spa3r.data import SkippedReport


def batch(pictures: int = 8, bad: int = 0, scenes: int = 2, broken: int = 0) -> dict:
    entries = [{"source": "src", "scene": "a", "picture": f"{n}.jpg", "reason": "cut off"} for n in range(bad)]
    entries += [{"source": "src", "scene": f"b{n}", "picture": "", "reason": "gone"} for n in range(broken)]
    return {"skipped": entries, "num_pictures": pictures, "scenes": ["src/x"] * scenes}


def test_the_report_names_what_was_skipped():
    report = SkippedReport()
    assert str(report) == "Nothing was skipped: 0 pictures of 0 scenes were read."
    for _ in range(3):
        report.add(batch(8, 1, 2, 1))
    assert str(report).splitlines() == [
        "Skipped: 3 of 24 pictures tried, 3 of 9 scenes.",
        "  src/a/0.jpg, 3 times: cut off",
        "  src/b0, 3 times: gone",
    ]
    assert report.entries()[0] == {
        **{"source": "src", "scene": "a", "picture": "0.jpg", "reason": "cut off", "times": 3}
    }


def test_a_long_report_is_cut():
    report = SkippedReport()
    report.add(batch(100, 60))
    assert len(str(report).splitlines()) == 52 and str(report).endswith("and 10 more")
    assert len(report.entries()) == 60


@pytest.mark.parametrize(("what", "fields"), [("pictures", {"bad": 4}), ("scenes", {"broken": 2})])
def test_more_than_the_share_raises_with_words(what, fields):
    report = SkippedReport(0.05)
    with pytest.raises(
        RuntimeError, match=rf"`max_bad_share` = 0\.05 of the {what} may be bad, got \d+ of \d+ \(50"
    ) as error:
        for _ in range(100):
            report.add(batch(8, **fields))
    assert "Repair or remove them, or accept more with a larger `max_bad_share`" in str(error.value)
    assert "src/" in str(error.value)
    assert report.pictures_tried <= 104 and report.scenes_tried <= 40


def test_a_few_bad_pictures_at_the_start_are_bad_luck():
    report = SkippedReport(0.05)
    report.add(batch(8, 8))
    report.add(batch(2, 0, 1, 1))
    for _ in range(40):
        report.add(batch(8))


@pytest.mark.parametrize("seed", range(5))
def test_the_stated_share_passes_and_twice_of_it_does_not(seed):
    rng = np.random.default_rng(seed)
    report = SkippedReport(0.05)
    for bad in rng.binomial(24, 0.05, 2000):
        report.add(batch(24, bad))
    twice = SkippedReport(0.05)
    with pytest.raises(RuntimeError):
        for bad in rng.binomial(24, 0.1, 2000):
            twice.add(batch(24, bad))
    assert twice.pictures_tried < 2000


def test_a_share_of_nothing_and_of_everything():
    SkippedReport(1).add(batch(200, 200, 0, 50))
    with pytest.raises(RuntimeError, match=r"`max_bad_share` = 0 of the pictures may be bad, got 1 of 8"):
        SkippedReport(0).add(batch(8, 1))
