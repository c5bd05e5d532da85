"""The queue in front of the worker: bounded, fair between clients, and taken in batches."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar


class Item(Protocol):
    """What waits: one picture."""

    @property
    def client(self) -> str:
        """Who asked; each client has its turn."""

    @property
    def batch_key(self) -> Hashable | None:
        """Items of equal keys can be drawn together; None: alone."""

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more."""


T = TypeVar("T", bound=Item)


class WaitingItems(Generic[T]):
    """Items in the order in which clients take turns.

    Args:
        limit: how many items may wait.
        on_change: called with the number of waiting items whenever it may have changed.
    """

    def __init__(self, limit: int, on_change: Callable[[int], None] = lambda _: None) -> None:
        self._limit = limit
        self._on_change = on_change
        self._changed = threading.Condition()
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._clients.values()))

    def put(self, items: Sequence[T]) -> bool:
        """Let all of ``items`` wait, which are one client's; False, and none of them, if there is no room."""
        with self._changed:
            self._drop_abandoned()
            if sum(map(len, self._clients.values())) + len(items) > self._limit:
                return False
            self._clients.setdefault(items[0].client, deque()).extend(items)
            self._changed.notify()
            self._tell()
            return True

    def take(self, most: int, disturbed: Callable[[], bool] = lambda: False) -> list[T]:
        """The next items that can be drawn together, once there are some; none after `close`, or while ``disturbed``.

        The first is that of the client whose turn it is; others of equal keys ride along, one of each client in turn.
        """
        with self._changed:
            while True:
                self._drop_abandoned()
                if self._clients or self._closed or disturbed():
                    break
                self._changed.wait()
            if not self._clients or disturbed():
                return []
            turn, own = self._clients.popitem(last=False)
            taken = [own.popleft()]
            if own:
                self._clients[turn] = own  # its next turn comes after all others'
            key = taken[0].batch_key
            while key is not None and len(taken) < most:
                riders = [next((i for i in items if i.batch_key == key), None) for items in self._clients.values()]
                found = [item for item in riders if item is not None][: most - len(taken)]
                if not found:
                    break
                for item in found:
                    self._clients[item.client].remove(item)
                taken += found
            self._drop_abandoned()
            self._tell()
            return taken

    def wake(self) -> None:
        """Let `take` look anew whether it is disturbed."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """`take` returns what waits, then nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _drop_abandoned(self) -> None:
        for client, items in list(self._clients.items()):
            kept = deque(item for item in items if not item.abandoned)
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        self._tell()

    def _tell(self) -> None:
        self._on_change(sum(map(len, self._clients.values())))
