"""The order of questions: one at a time, as they arrive, with long lists of words in between. Has no model."""

import asyncio
import contextvars
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ovsam import InputError

LOOK = 0.25  # seconds between two checks of a waiting question
PATIENCE = 1.0  # seconds for which a list of words gives way to questions, at least
SHARE = 0.02  # of the time that a list of words takes while questions wait, at most
LAST = 30.0  # seconds that the end of the program waits for a running model
LISTS = 200  # whose state is kept

Show = Callable[[str, float | None], None]  # gets the progress as a text and a fraction


def no_show(text: str, share: float | None = None) -> None:
    pass


class Turns:
    """Questions to the models, one at a time in the order of arrival.

    `free` is held while a model runs.
    """

    def __init__(self, most: int):
        self.most, self.free, self.closed = most, threading.Lock(), False
        self._thread = ThreadPoolExecutor(1, "question")
        self._asked: list[Future] = []

    def waiting(self) -> list[Future]:
        """The unfinished questions."""
        return [one for one in self._asked if not one.done()]

    async def take(self, question: Callable[[], Any], show: Show = no_show) -> Any:
        """Wait for the turn of a question and return its answer. A cancelled question loses its place; the answer
        of one that is running is dropped.

        Raises InputError if too many wait.
        """
        ahead = self.waiting()
        if len(ahead) >= self.most:
            raise InputError(f"{self.most} questions are waiting already; ask again in a minute.")
        context = contextvars.copy_context()  # a ZeroGPU Space reads the visitor from it
        turn = self._thread.submit(context.run, self._run, question)
        self._asked = [*ahead, turn]
        answer = asyncio.wrap_future(turn)
        answer.add_done_callback(lambda one: one.cancelled() or one.exception())  # else a lost error is logged
        try:
            while not turn.done():
                place = sum(not one.done() for one in ahead)
                show(f"{place} before you" if place else "The model is running", None)
                await asyncio.wait([answer], timeout=LOOK)
            return turn.result()
        finally:
            turn.cancel()

    def _run(self, question: Callable[[], Any]) -> Any:
        with self.free:
            return question()

    def let_pass(self, took: float = 0.0) -> None:
        """Wait while there are questions, for a limited time, which grows with the seconds that the last part took."""
        end = time.monotonic() + max(PATIENCE, took / SHARE)
        while self.closed or (self.waiting() and time.monotonic() < end):
            time.sleep(0.01)

    def close(self) -> None:
        """Let a running model finish, and start none any more: torch aborts a program that ends while it computes."""
        self.closed = True
        self.free.acquire(timeout=LAST)


class WordLists:
    """Long lists of words, each embedded once, in small parts between the questions."""

    def __init__(self, turns: Turns):
        self._turns, self._lock = turns, threading.Lock()
        self._lists: OrderedDict[Any, _List] = OrderedDict()

    def begin(self, name: Any, embed: Callable[[Callable[[int, int], None]], Any]) -> "_List":
        """Start to embed a list in the background unless it was started; `embed` takes a function that it calls before
        the first part and after each, with the number of finished words and of all. Only the parts take turns:
        questions need not wait while words are read or embeddings are written."""
        with self._lock:
            known = self._lists.get(name)
            if known is None or known.error is not None:
                known = self._lists[name] = _List()
                # A daemon, so that closing the demo does not wait for it.
                threading.Thread(target=self._embed, args=(known, embed), daemon=True).start()
            while len(self._lists) > LISTS:
                self._lists.popitem(last=False)
            return known

    async def ready(self, name: Any, embed: Callable, show: Show = no_show) -> None:
        """Wait until a list is embedded; raises its error."""
        known = self.begin(name, embed)
        while not known.ready.is_set():
            text = f"{known.done:,} of {known.total:,} words" if known.total else "The words are next"
            show(text, known.done / known.total if known.total else None)
            await asyncio.sleep(LOOK)
        if known.error is not None:
            raise known.error

    def _embed(self, known: "_List", embed: Callable) -> None:
        began: float | None = None  # the time when the running part began; None between parts

        def end_part() -> float:
            """Seconds that the part took."""
            nonlocal began
            if began is None:
                return 0.0
            took, began = time.monotonic() - began, None
            self._turns.free.release()
            return took

        def rest(done: int, total: int) -> None:
            nonlocal began
            known.done, known.total = done, total
            took = end_part()
            if done < total:
                self._turns.let_pass(took)
                self._turns.free.acquire()
                began = time.monotonic()

        try:
            embed(rest)
        except Exception as error:  # raised by `ready`
            known.error = error
        finally:
            end_part()
        known.ready.set()


class _List:
    """The progress of a list."""

    def __init__(self):
        self.done = self.total = 0
        self.error: Exception | None = None
        self.ready = threading.Event()
