"""How figures are written on slides that are French."""

from __future__ import annotations

import pytest

from pipeline.present.slides import cores, day, duration, number, percent, size

NARROW, NO_BREAK = "\u202f", "\u00a0"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(13810), f"13{NARROW}810"),
        (number(7.46, 1), "7,5"),
        (percent(0.9501), f"95,0{NO_BREAK}%"),
        (duration(2.31), f"2,3{NO_BREAK}s"),
        (duration(79.4), f"1{NO_BREAK}min 19{NO_BREAK}s"),
        (duration(3 * 86400 + 7200 + 59), f"3{NO_BREAK}j 2{NO_BREAK}h"),
        (size(638_400), f"638{NO_BREAK}ko"),
        (size(3_072_000), f"3,1{NO_BREAK}Mo"),
        (size(5e15), f"5{NARROW}000{NO_BREAK}To"),
        (cores(1), f"1{NO_BREAK}cœur"),
        (cores(2), f"2{NO_BREAK}cœurs"),
        (day("2026-11-23T20:05:37+00:00"), "23 novembre 2026"),
    ],
)
def test_figures_are_written_as_in_french_print(written: str, expected: str) -> None:
    assert written == expected
