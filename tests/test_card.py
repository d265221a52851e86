"""Model cards."""

from small import small_model

from deflow_aug.card import model_card

FACTS = {
    "folder": "night",
    "images": 12,
    "pixels": 3_500_000,
    "left_out": {"unreadable": 2, "smaller than the crop": 0},
    "sha256": "0123456789abcdef0123",
    "also": [{"folder": "more", "images": 3, "downscale": 4}],
}


def test_folders_are_a_table() -> None:
    card = model_card(small_model(), {"data": {"clean": FACTS}, "recipe": {"steps": 3}})
    (row,) = [line for line in card.splitlines() if line.startswith("| clean")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "clean", "night", "12", "3.5", "2 unreadable", "`0123456789abcdef`",
        "also: folder more, images 3, downscale 4",
    ]  # fmt: skip
    assert "- recipe:\n  - steps: 3\n" in card
    header, rule = card.splitlines()[card.splitlines().index(row) - 2 :][:2]
    assert header.count("|") == rule.count("|") == row.count("|")


def test_what_it_was_learned_from() -> None:
    pairs = {"folder": "p", "pairs": 4}
    for data, kind in (
        ({"clean": FACTS}, "from unpaired images"),
        ({"a, paired": pairs}, "from paired images"),
        ({"clean": FACTS, "a, paired": pairs}, "from unpaired and paired images"),
    ):
        assert kind in model_card(small_model(), {"data": data})
    assert "from unpaired images" in model_card(small_model(), {})


def test_facts_of_another_shape_are_a_list() -> None:
    card = model_card(small_model(), {"data": {"clean": "photos"}, "notes": "Mind the gap."})
    assert "- data:\n  - clean: photos" in card
    assert "Mind the gap.\n\n- data" in card


def test_pictures_come_with_what_they_show() -> None:
    plain = model_card(small_model(), {})
    assert "![" not in plain
    card = model_card(small_model(), {}, pictures={"samples": "samples.png"})
    assert "![Samples](samples.png)" in card
    assert "pieces of the photographs" in card
    assert "curves" not in card


def test_several_domains_are_named_in_the_example() -> None:
    card = model_card(small_model(domains=("low", "vintage")), {})
    assert 'seed=0, domain="low")' in card
    assert "`low`, `vintage`" in card
    assert "domain=" not in model_card(small_model(), {})
