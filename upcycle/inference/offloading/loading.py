"""Loads in the background: what is needed now before what is only expected."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Event, Thread


class ExpertLoad:
    """One load: a function that runs once, on a thread of a :class:`Loader` or on that of who waits for it first.

    Attributes:
        done: whether it has run.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ran = Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run it; an error is kept for who waits."""
        try:
            self._work()
        except BaseException as error:  # raised again where it is waited for
            self._error = error
        finally:
            self._ran.set()

    @property
    def done(self) -> bool:
        """Whether it has run."""
        return self._ran.is_set()

    def result(self) -> None:
        """Wait until it has run, and raise the error that it met."""
        self._ran.wait()
        if self._error is not None:
            raise self._error


class Loader:
    """Runs loads on threads of its own. Urgent ones go first; a load that has not begun can be taken back.

    Args:
        threads: how many loads run at the same time; with 0, each runs when it is waited for.
    """

    def __init__(self, threads: int) -> None:
        self._changed = Condition()
        self._urgent: deque[ExpertLoad] = deque()
        self._expected: deque[ExpertLoad] = deque()
        self._closed = False
        self._threads = [Thread(target=self._serve, daemon=True, name=f"experts-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, load: ExpertLoad, urgent: bool) -> None:
        """Hand over a load."""
        with self._changed:
            (self._urgent if urgent else self._expected).append(load)
            self._changed.notify()

    def hurry(self, load: ExpertLoad) -> None:
        """Make a load urgent that was only expected, unless it has begun."""
        if self.take_back(load):
            self.submit(load, urgent=True)

    def take_back(self, load: ExpertLoad) -> bool:
        """Return whether a load had not begun; then it never will by itself."""
        with self._changed:
            for queue in (self._urgent, self._expected):
                if load in queue:
                    queue.remove(load)
                    return True
        return False

    def finish(self, load: ExpertLoad) -> None:
        """Wait for a load; one that has not begun runs on this thread. Raises what it raised."""
        if not load.done and self.take_back(load):
            load.run()
        load.result()

    def close(self) -> None:
        """Stop the threads behind the loads that run now; the others are dropped."""
        with self._changed:
            self._closed = True
            self._urgent.clear()
            self._expected.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._urgent or self._expected or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                load = (self._urgent or self._expected).popleft()
            load.run()
