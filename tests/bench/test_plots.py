"""Bars and curves stand where their figures are, and say whose they are."""

from pathlib import Path

from orthrus.bench.metrics import Estimate
from orthrus.bench.plots import Album, bars, curves


def test_bars_stand_in_their_sections_and_estimates_have_intervals(tmp_path: Path) -> None:
    album = Album(tmp_path / "deep")
    with album.picture("bars.png", title="t") as axes:
        bars(axes, {"a": {"x": Estimate(2.0, 1.0, 4.0), "y": 3.0}, "b": {"y": 5.0}})
        drawn = [container for container in axes.containers if hasattr(container, "patches")]
        assert [[round(bar.get_x() + bar.get_width() / 2, 6) for bar in one] for one in drawn] == [[-0.2, 0.8], [1.2]]
        assert [[bar.get_height() for bar in one] for one in drawn] == [[2.0, 3.0], [5.0]]
        (line,) = drawn[0].errorbar.lines[2]
        assert line.get_segments()[0][:, 1].tolist() == [1.0, 4.0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y"]
    assert album.files == [tmp_path / "deep" / "bars.png"]
    assert axes.get_legend() is not None


def test_the_first_part_of_a_label_picks_the_dashes_and_the_rest_the_colour(tmp_path: Path) -> None:
    with Album(tmp_path).picture("curves.png") as axes:
        points = [(8.0, 1.0), (1.0, 2.0)]
        curves(axes, {"draft, b1": points, "draft, b8": points, "verify, b1": points}, doubling=True)
        looks = [(one.get_linestyle(), one.get_color()) for one in axes.get_lines()]
        assert looks == [("-", "C0"), ("-", "C1"), ("--", "C0")]
        assert list(axes.get_lines()[0].get_xdata()) == [1.0, 8.0]
        assert (axes.get_xscale(), list(axes.get_xticks()), axes.get_ylim()[0]) == ("log", [1.0, 8.0], 0.0)
