"""The plan of the house is that of the files: every file has a room, and imports go one way."""

from __future__ import annotations

import pytest
from house import PAGE, ROOMS, between_rooms, circle, imports, needed, page, room_of

import specformer

pytestmark = pytest.mark.one_version


def test_every_file_has_a_room():
    assert {room_of(module) for module in imports()} == set(ROOMS)
    with pytest.raises(KeyError, match=r"attic\.py is in no room"):
        room_of("attic")


def test_imports_go_one_way():
    assert circle(imports()) is None
    assert circle(between_rooms()) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_arrows_that_a_longer_way_replaces_are_left_out():
    assert needed({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [("a", "b"), ("b", "c")]


def test_the_page_is_of_these_files():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/house.py"


def test_the_package_names_the_rooms():
    plan = specformer.__doc__.partition("generation/")[2]
    assert all(f"\n    {room}" in plan for room in ROOMS)
