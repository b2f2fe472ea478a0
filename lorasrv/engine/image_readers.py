"""What reads adapters' page images for the host cache inside this process."""

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from lorasrv_adapters.host_cache import HostCache, ImageReader

Image = TypeVar("Image")
_NUM_THREADS = 2


class ImageSource(ImageReader[Image], Protocol[Image]):
    """An `ImageReader` as its owner sees it: `engine.tiers`, in the engine's thread."""

    def deliver(self, cache: HostCache[Image]) -> None:
        """Tell the cache what has been measured and finished since the last call."""
        ...

    @property
    def reading(self) -> Mapping[str, bool]:
        """The reads under way, and whether each is so slow that it may hang."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to `deliver`, or after `timeout_s`."""
        ...

    def check(self) -> None: ...

    def close(self) -> None:
        """End all reads."""
        ...


class ThreadReader(Generic[Image]):
    """Reads in worker threads of this process, by `load`, which makes an image at once: up to `_NUM_THREADS` of them
    are held beyond the cache's budget. For tests, and for versions that are in memory already.
    """

    def __init__(
        self,
        load: Callable[[str], Image],
        size_of: Callable[[Image], int],
        on_load_end: Callable[[], None] | None = None,
    ) -> None:
        """`on_load_end` is called in a worker after each load."""
        self._load = load
        self._size_of = size_of
        self._on_load_end = on_load_end
        self._workers = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="image-reader")
        self._ended: queue.SimpleQueue[tuple[str, Image | Exception]] = queue.SimpleQueue()
        self._stirred = threading.Event()
        self._loading: set[str] = set()
        self._loaded: dict[str, Image] = {}

    @property
    def is_free(self) -> bool:
        return len(self._loading) + len(self._loaded) < _NUM_THREADS

    def measure(self, digest: str) -> None:
        self._loading.add(digest)
        self._workers.submit(self._run, digest)

    def build(self, digest: str) -> Image | None:
        return self._loaded.pop(digest)

    def abandon(self, digest: str) -> None:
        del self._loaded[digest]

    @property
    def reading(self) -> Mapping[str, bool]:
        """Memory does not hang."""
        return dict.fromkeys(self._loading, False)

    def free(self, image: Image) -> None:
        """The last reference to it frees it."""

    def deliver(self, cache: HostCache[Image]) -> None:
        while True:
            try:
                digest, result = self._ended.get_nowait()
            except queue.Empty:
                return
            self._loading.remove(digest)
            if isinstance(result, Exception):
                cache.finished(digest, result)
            else:
                self._loaded[digest] = result
                cache.measured(digest, self._size_of(result))

    def wait(self, timeout_s: float) -> None:
        self._stirred.wait(timeout_s)
        self._stirred.clear()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._loading) + len(self._loaded) <= _NUM_THREADS, "too many images are held"
        assert not self._loading & self._loaded.keys(), "an image is loaded and loading"

    def close(self) -> None:
        """Wait for the loads that run, and begin no more."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._ended = queue.SimpleQueue()
        self._loading.clear()
        self._loaded.clear()

    def _run(self, digest: str) -> None:
        """In a worker thread."""
        try:
            result: Image | Exception = self._load(digest)
        except Exception as error:  # whatever goes wrong fails this adapter's requests, nothing else
            result = error
        self._ended.put((digest, result))
        self._stirred.set()
        if self._on_load_end is not None:
            self._on_load_end()
