"""Runs jobs in processes, and ends these with the command."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch

from ..errors import ConceptError
from ..training.process_group import is_launched


class Steps:
    """Counts the steps of learning in all processes."""

    counter: Synchronized | None = None

    @classmethod
    def count(cls, _: object) -> None:
        if cls.counter is not None:
            with cls.counter.get_lock():
                cls.counter.value += 1


def _begin(counter: Synchronized) -> None:
    Steps.counter = counter


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, even if that was killed. It would wait for jobs forever."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _begin_process(counter: Synchronized) -> None:
    """Prepares a process. Ctrl-C and a closed terminal reach all of them; the first one ends the others.

    That is by SIGTERM. It may come at once, so it is blocked until here, see `_signals_later`, and never
    ignored. A process that missed it could wait forever for a lock of another one.
    """
    for number in {signal.SIGINT, *_stopping()} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *_stopping()})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _begin(counter)


def _stopping() -> tuple[signal.Signals, ...]:
    """The signals that end a command as Ctrl-C does: `kill`, and where there is one, a closed terminal."""
    return tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


_CAN_BLOCK = hasattr(signal, "pthread_sigmask")      # not on Windows


@contextmanager
def _signals_later() -> Iterator[None]:
    """Within it, signals that end a command wait. A process that is started within it inherits that: a signal
    that comes before the process is prepared would otherwise be lost."""
    if not _CAN_BLOCK:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_stopping()})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


GRACE = 10.0      # seconds in which a stopped command may clean up


def _stop_once() -> Callable[..., None]:
    """A signal's handler that raises KeyboardInterrupt. Signals soon after the first one do nothing: they
    would break off what removes files and ends processes."""
    first: list[float] = []

    def stop(*_: object) -> None:
        now = time.monotonic()
        if not first or now - first[0] > GRACE:
            first[:] = [now]
            raise KeyboardInterrupt

    return stop


@contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that temporary files are
    removed. Further signals are ignored for `GRACE` seconds.

    Only the main thread may set what a signal does. A signal that is ignored, as `nohup` does, or that a
    program handles itself stays as it is. So do all where several processes learn together: each may wait
    for another one, in code that Python cannot interrupt.
    """
    stop, is_main = _stop_once(), threading.current_thread() is threading.main_thread()
    is_main &= not is_launched()
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_stopping())} if is_main else {}
    changed = {number: handler for number, handler in before.items() if handler in usual}
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def _can_be_passed_on(error: BaseException) -> bool:
    """Whether another process can rebuild an error, in the way in which the pool passes it on."""
    try:
        return isinstance(ForkingPickler.loads(ForkingPickler.dumps(error)), BaseException)
    except Exception:
        return False


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its text cannot be read"


def _with_told_error(job: Callable, *arguments: object) -> object:
    """Calls a job. An error that cannot be passed on becomes one that tells its type and text. The pool would
    take the process for one that was ended from outside."""
    try:
        return job(*arguments)
    except BaseException as error:
        if _can_be_passed_on(error):
            raise
        kind = type(error)
        raise RuntimeError(f"{kind.__module__}.{kind.__qualname__}: {_text_of(error)}") from error


@contextmanager
def _ended_from_outside() -> Iterator[None]:
    """Turns the end of a process into a ConceptError."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ConceptError("a process of this command was ended from outside, as the system does where "
                           "memory is short; close other programs and run the command again") from error


class Workers:
    """Runs jobs in processes with one thread each. Two threads of a small base wait for one another.

    On Linux the processes are forks of this one. They share its modules and its base instead of loading them
    again. A context: if it is left with an error, no further job begins, and those that run are ended.

    Args:
        count: Number of processes; 1 = this one alone.
        load: Loads what forks share; not called where they are no forks.
    """

    def __init__(self, count: int, load: Callable[[], object]) -> None:
        self.pool: ProcessPoolExecutor | ThreadPoolExecutor
        self.others = active_children()
        if count > 1:
            forks = sys.platform == "linux"
            if forks:
                load()
            context = get_context("fork" if forks else "spawn")
            self.counter = context.Value("i", 0)
            self.pool = ProcessPoolExecutor(count, context, _begin_process, (self.counter,))
        else:
            self.counter = get_context().Value("i", 0)
            self.pool = ThreadPoolExecutor(1, initializer=_begin, initargs=(self.counter,))
        self.running: dict[Future, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for process in active_children():
                if process not in self.others:
                    process.terminate()
        self.pool.shutdown(cancel_futures=kind is not None)

    def start(self, purpose: Any, job: Callable, *arguments) -> None:
        """Queues `job(*arguments)`.

        Args:
            purpose: What the result is for; `finished` returns it.
            job: A function of a module, which other processes can find.
            arguments: Of the function.

        Raises:
            ConceptError: A process was ended from outside.
        """
        with _ended_from_outside(), _signals_later():      # the first call starts the processes
            self.running[self.pool.submit(_with_told_error, job, *arguments)] = purpose

    def finished(self) -> list[tuple[Any, Any]]:
        """Waits for the next jobs, a second at most. Returns purpose and result of each that is finished.

        Raises:
            ConceptError: A process was ended from outside.
            Exception: What a job raised; a RuntimeError that tells of it where it cannot be passed on.
        """
        done, _ = wait(self.running, timeout=1, return_when=FIRST_COMPLETED)
        with _ended_from_outside():
            return [(self.running.pop(future), future.result()) for future in done]
