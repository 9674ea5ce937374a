"""Shards fetched before they are needed, by a thread of the process that will read them."""

import os
import threading
from collections.abc import Sequence

from simclr_dist.data.remote.cache import ShardCache
from simclr_dist.system.errors import UserError

_PAUSE = 0.2


class Ahead:
    """Keeps a list of shards in the cache, in the order of need, while the process does other things.

    What it cannot fetch it leaves: the reader will try itself, and say so. Of several processes that want the same shards
    each takes one that no other is fetching.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: tuple[int, ...] = ()
        self._changed = threading.Event()
        self._left = threading.Event()
        self._process = -1

    def want(self, shards: Sequence[int]) -> None:
        """From now on these, soonest needed first, and no others."""
        if self._process != os.getpid():  # also in a child, which has no threads of its parent
            self._changed, self._left = threading.Event(), threading.Event()
            self._process = os.getpid()
            threading.Thread(target=self._run, args=(self._changed, self._left), daemon=True).start()
        self._wanted = tuple(shards)
        self._changed.set()

    def close(self) -> None:
        """Stop; a fetch that is under way ends with its next failure or with itself."""
        if self._process == os.getpid():
            self._left.set()
            self._changed.set()

    def _run(self, changed: threading.Event, left: threading.Event) -> None:
        while True:
            changed.wait()
            if left.is_set():
                return
            changed.clear()
            more = True
            while more and not (changed.is_set() or left.is_set()):
                more = self._once(changed, left)
                if more:
                    changed.wait(_PAUSE)  # another process is fetching what is left

    def _once(self, changed: threading.Event, left: threading.Event) -> bool:
        """Go through the list once; whether something of it is still missing, and may come."""
        wanted, missing = self._wanted, False
        for shard in wanted:
            if changed.is_set() or left.is_set():
                return True
            try:
                if not self._cache.has(shard):
                    if not self._cache.fetch_ahead(shard, wanted, left.is_set):
                        return False  # no room before some of it has been read
                    missing = missing or not self._cache.has(shard)
            except UserError:
                return False
        return missing
