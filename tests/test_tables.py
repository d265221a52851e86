"""Tables of figures in Markdown and in HTML."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from deflow_aug.evaluation.tables import Table, number

TABLE = Table(
    "KL of <a> & b",
    ("method", "KL", "verdict"),
    (("white | tuned", "0.5", "**miss**"), ("ours", "0.1", "pass")),
    ("In nats.", "Lower is better."),
    align="lrl",
)


def test_markdown_has_title_rule_rows_and_notes() -> None:
    assert TABLE.to_markdown(level=2).splitlines() == [
        "## KL of <a> & b",
        "",
        "| method | KL | verdict |",
        "|---|---:|---|",
        r"| white \| tuned | 0.5 | **miss** |",
        "| ours | 0.1 | pass |",
        "",
        "In nats.",
        "",
        "Lower is better.",
    ]


def test_html_is_well_formed_and_holds_every_cell() -> None:
    figure = ElementTree.fromstring(TABLE.to_html())
    texts = ["".join(cell.itertext()) for cell in figure.iter() if cell.tag in ("th", "td")]
    assert texts == [*TABLE.columns, "white | tuned", "0.5", "miss", "ours", "0.1", "pass"]
    assert figure.findtext("figcaption") == TABLE.title
    assert [p.text for p in figure.iter("p")] == list(TABLE.notes)
    assert [c.get("class") for c in figure.iter("th")] == [None, "r", None, None, None]
    assert [strong.text for strong in figure.iter("strong")] == ["miss"]


def test_by_default_figures_stand_to_the_right_and_nothing_above() -> None:
    plain = Table("", ("a", "b", "c"), (("1", "2", "3"),))
    assert plain.to_markdown() == "| a | b | c |\n|---|---:|---:|\n| 1 | 2 | 3 |\n"
    assert "figcaption" not in plain.to_html()


@pytest.mark.parametrize(
    ("rows", "align", "message"),
    [((("1",),), "", "expected 2 cells"), ((), "lc", "letters l or r"), ((), "l", "takes 2")],
)
def test_what_does_not_fit_is_refused(rows: tuple[()], align: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table("", ("a", "b"), rows, align=align)


def test_numbers() -> None:
    assert [number(1.23456), number(2, 1), number(math.nan)] == ["1.235", "2.0", "-"]
