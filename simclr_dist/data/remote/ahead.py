"""Fetch shards before they are needed. A thread of the process that reads them does so."""

import os
import threading
from collections.abc import Sequence

from simclr_dist.data.remote.cache import ShardCache
from simclr_dist.system.errors import UserError

_PAUSE = 0.2


class Ahead:
    """Fetches a list of shards into the cache, in order of need. The process does other things meanwhile.

    It leaves what it cannot fetch: the reader will try, and report it. When several processes want the same shards, each
    takes one that no other is fetching.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: tuple[int, ...] = ()
        self._changed = threading.Event()
        self._left = threading.Event()
        self._process = -1

    def __reduce__(self) -> tuple[type, tuple[ShardCache]]:
        return Ahead, (self._cache,)  # a copy in another process begins anew

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these from now on, soonest needed first, and no others."""
        if self._process != os.getpid():  # also in a child, which has no threads of its parent
            self._changed, self._left = threading.Event(), threading.Event()
            self._process = os.getpid()
            threading.Thread(target=self._run, args=(self._changed, self._left), daemon=True).start()
        self._wanted = tuple(shards)
        self._changed.set()

    def close(self) -> None:
        """Stop fetching. A fetch that is under way goes on until it is done or fails next."""
        if self._process == os.getpid():
            self._left.set()
            self._changed.set()

    def _run(self, changed: threading.Event, left: threading.Event) -> None:
        while True:
            changed.wait()
            if left.is_set():
                return
            changed.clear()
            while not (changed.is_set() or left.is_set()) and self._once(changed, left):
                changed.wait(_PAUSE)  # another process is fetching what is left

    def _once(self, changed: threading.Event, left: threading.Event) -> bool:
        """Go through the list once. Returns whether a shard is still missing and may come."""
        wanted, missing = self._wanted, False
        try:
            for shard in wanted:
                if changed.is_set() or left.is_set():
                    return True
                if not self._cache.has(shard):
                    if not self._cache.fetch_ahead(shard, wanted, left.is_set):
                        return False  # no room before some of it has been read
                    missing = missing or not self._cache.has(shard)
        except UserError:
            return False
        return missing
