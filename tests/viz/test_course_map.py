"""The map of the course and the tour's exercise: boxes where the needs put them, minutes that the
pages say.
"""

from __future__ import annotations

import re
from dataclasses import replace

import nbformat
import pytest

pytest.importorskip("matplotlib")

from minivllm.course.authoring.tool import ROOT
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import check
from minivllm.course.notebooks import ROAD, Chapter, Stop, as_committed, road
from minivllm.viz.course_map import columns, direct, draw_course_map, places

pytestmark = pytest.mark.slow

STOPS = [
    Stop("00_tour", "begin", "", reading=5),
    Stop("01_one", "kernels", "", reading=50, exercises=40),
    Stop("02_two", "kernels", "", ("01",), reading=30, exercises=80),
    Stop("03_three", "engine", "", ("01", "02")),
    Stop("04_four", "engine", "", ("01",), ("03",), reading=20),
]


def test_places_follow_from_needs() -> None:
    assert columns(STOPS) == {"00": 0, "01": 0, "02": 1, "03": 2, "04": 1}
    assert direct(STOPS) == {"00": [], "01": [], "02": ["01"], "03": ["02"], "04": ["01"]}
    assert places(STOPS) == {"01": (0, 0), "00": (0, 1), "02": (1, 0), "04": (1, 1), "03": (2, 0)}
    with pytest.raises(ValueError, match="02 needs 03, which do not come before it"):
        columns([STOPS[1], replace(STOPS[2], needs=("03",))])


def test_the_picture_says_it_in_words() -> None:
    figure = draw_course_map(STOPS)
    found = [text.get_text() for text in figure.axes[0].texts]
    assert {"5", "50 + 40", "30 + 80", "20", "to come"} <= set(found)
    assert figure.caption == "2 hours of reading and 2 hours of exercises. Still to come: 03."
    assert figure.alt.endswith(
        "Nothing is needed for 00 and 01; 02 after 01, 03 after 02, 04 after 01."
    )
    assert len(figure.to_png()) < 60_000


def test_no_two_chapters_in_one_place() -> None:
    where = places(ROAD)
    assert len(set(where.values())) == len(ROAD)


def test_no_chapter_stands_in_the_way_of_an_arrow() -> None:
    """The arrow from 03 to 05 passes through the second row of the third column."""
    stops = [
        Stop("01_one", "kernels", ""),
        Stop("02_two", "kernels", "", ("01",)),
        Stop("03_three", "kernels", "", ("01",)),
        Stop("04_four", "kernels", "", ("02",)),
        Stop("05_five", "kernels", "", ("04",), ("03",)),
        Stop("06_six", "kernels", "", ("03",)),
    ]
    where = places(stops)
    assert (where["03"], where["05"]) == ((1, 1), (3, 0))
    assert (where["04"], where["06"]) == ((2, 0), (2, 2))


# --- the road and the pages -----------------------------------------------------------------------


def test_the_road_is_the_notebooks() -> None:
    committed = [
        path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if as_committed(path)[0]
    ]
    assert [stop.name for stop in ROAD if stop.name in committed] == committed


@pytest.fixture(scope="module")
def stops() -> dict[str, Stop]:
    return {stop.name: stop for stop in road(ROOT)}


@pytest.mark.parametrize("name", [stop.name for stop in ROAD])
def test_a_page_says_what_the_road_says(name: str, stops: dict[str, Stop]) -> None:
    stop = stops[name]
    path = ROOT / "notebooks" / f"{stop.name}.ipynb"
    if not path.exists():
        pytest.skip(f"{path.name} is to come")
    assert 5 <= stop.reading <= 90
    if Chapter(ROOT, stop.name).solution_path.exists():
        assert 60 <= stop.exercises <= 240
    cells = nbformat.reads(
        as_committed(path)[0] or path.read_text(encoding="utf-8"), as_version=4
    ).cells[:4]
    text = "\n".join(cell.source for cell in cells)
    if (
        said := re.search(r"(?:\*\*You need:\*\*|Know first:)(.+?)(?:\n\n|\Z)", text, re.DOTALL)
    ) is not None:
        text = re.sub(r"\]\([^)]*\)", "]", said[1])
        chapters = re.findall(r"chapters? (\d+(?:(?:, | and )\d+)*)", text)
        mentioned = {int(number) for group in chapters for number in re.findall(r"\d+", group)}
        assert mentioned <= {int(number) for number in (*stop.needs, *stop.helps)}, (
            "mend ROAD, or what the page says"
        )


def test_the_tour_links_every_chapter() -> None:
    path = ROOT / "notebooks/00_tour.ipynb"
    text = as_committed(path)[0] or path.read_text(encoding="utf-8")
    cells = nbformat.reads(text, as_version=4).cells
    page = "\n".join(cell.source for cell in cells if not cell.id.startswith("nav-"))
    links = re.findall(r"\]\((\d\d_\w+)\.ipynb\)", page)
    assert list(dict.fromkeys(links)) == [stop.name for stop in ROAD[1:]]


# --- the exercise that is done together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda num_tokens, block_size: num_tokens // block_size, "rounded-down"),
        (lambda num_tokens, block_size: num_tokens // block_size + 1, "one-too-many"),
        (lambda num_tokens, block_size: round(num_tokens / block_size), "rounded"),
    ],
)
def test_wrong_answers_are_named(wrong, name: str) -> None:
    with pytest.raises(Mistake) as caught:
        check("00.1", wrong)
    assert caught.value.name == name


def test_the_right_answer_passes(capsys: pytest.CaptureFixture) -> None:
    check("00.1", lambda num_tokens, block_size: (num_tokens + block_size - 1) // block_size)
    assert capsys.readouterr().out == "00.1 passed: right for 9 requests\n"
