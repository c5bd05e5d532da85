"""The queue: whose turn it is, and who is drawn together."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass

import pytest

from fp8_compile.serve.orders import Order
from fp8_compile.serve.painter import preview_steps
from fp8_compile.serve.waiting import WaitingItems


@dataclass(eq=False)
class Item:
    client: str
    batch_key: Hashable | None = "same"
    abandoned: bool = False


def test_each_client_has_its_turn() -> None:
    waiting: WaitingItems[Item] = WaitingItems(10)
    many, few = [Item("many") for _ in range(5)], [Item("few")]
    assert waiting.put(many)
    assert waiting.put(few)
    taken = [waiting.take(1) for _ in range(6)]
    assert [items[0].client for items in taken] == ["many", "few", "many", "many", "many", "many"]
    assert [items[0] for items in taken if items[0].client == "many"] == many


def test_equal_keys_ride_along_one_of_each_client_in_turn() -> None:
    waiting: WaitingItems[Item] = WaitingItems(10)
    a, b = [Item("a") for _ in range(3)], [Item("b", "other"), Item("b"), Item("b")]
    waiting.put(a)
    waiting.put(b)
    assert waiting.take(4) == [a[0], b[1], a[1], b[2]]
    assert waiting.take(4) == [b[0]]
    assert waiting.take(4) == [a[2]]


def test_without_a_key_each_is_alone() -> None:
    waiting: WaitingItems[Item] = WaitingItems(10)
    items = [Item("a", None), Item("a", None)]
    waiting.put(items)
    assert waiting.take(4) == items[:1]


def test_there_is_room_for_all_or_none_and_who_left_makes_some() -> None:
    told: list[int] = []
    waiting: WaitingItems[Item] = WaitingItems(3, told.append)
    first = [Item("a"), Item("a")]
    assert waiting.put(first)
    assert not waiting.put([Item("b"), Item("b")])
    assert len(waiting) == 2
    first[0].abandoned = True
    assert waiting.put([Item("b"), Item("b")])
    assert told[-1] == len(waiting) == 3


def test_who_left_is_not_taken() -> None:
    waiting: WaitingItems[Item] = WaitingItems(3)
    items = [Item("a"), Item("a"), Item("b")]
    waiting.put(items[:2])
    waiting.put(items[2:])
    items[0].abandoned = items[2].abandoned = True
    assert waiting.take(4) == [items[1]]


def test_taking_waits_and_ends_when_it_is_closed() -> None:
    waiting: WaitingItems[Item] = WaitingItems(3)
    taken: list[list[Item]] = []

    def take() -> None:
        while items := waiting.take(2):
            taken.append(items)

    thread = threading.Thread(target=take)
    thread.start()
    item = Item("a")
    waiting.put([item])
    waiting.close()
    thread.join(10)
    assert not thread.is_alive()
    assert taken == [[item]]


@pytest.mark.parametrize(
    ("previews", "steps", "shown"),
    [(0, 8, []), (1, 8, [4]), (3, 8, [2, 4, 6]), (3, 2, [1]), (3, 1, []), (2, 50, [17, 33])],
)
def test_previews_are_spread_evenly(previews: int, steps: int, shown: list[int]) -> None:
    assert preview_steps(previews, steps) == shown


def test_what_may_be_drawn_together() -> None:
    steps = {"num_inference_steps": 8}
    guided = {**steps, "negative_prompt": "green", "true_cfg_scale": 4.0}
    key = Order("a", (0,), steps).batch_key
    assert Order("b", (1, 2), dict(steps), previews=2, client="x").batch_key == key
    assert Order("a", (0,), {"num_inference_steps": 9}).batch_key != key
    assert Order("a", (0,), guided).batch_key != key
    assert Order("a", (0,), {**guided, "negative_prompt": "blue"}).batch_key == Order("a", (0,), guided).batch_key
    assert Order("a", (0,), {**guided, "true_cfg_scale": 5.0}).batch_key != Order("a", (0,), guided).batch_key
