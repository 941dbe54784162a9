"""An ordered map over processes with a bounded look-ahead.

Items go out in small groups, results come back in the order of the items, so what is written does
not depend on the number of workers. Workers are forked (they share what the kind has read), hear
no signals and die with the process that started them.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from mmtrain.errors import ExitCode, MmtrainError
from mmtrain.process import become_worker

Item = TypeVar("Item")
Result = TypeVar("Result")
_GROUP = 16  # items that travel together
_AHEAD = 3  # groups for each worker that are on their way or wait to be written


class WorkerError(MmtrainError):
    """A worker process was killed."""

    exit_code = ExitCode.PEER


_function: Callable[[Any], Any] | None = None  # of this worker


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Results of a function in the order of its items.

    Args:
        function: runs in the workers; reaches them by forking and need not be picklable.
        items: read ahead by a bounded number.
        workers: processes; 1 stays in this one.

    Raises:
        WorkerError: a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin, (function,))
    waiting: deque[Future[list[Result]]] = deque()
    source = iter(items)
    try:
        while group := list(islice(source, _GROUP)):
            waiting.append(pool.submit(_apply, group))
            if len(waiting) > _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process was killed, most often for want of memory; start the same command "
            "with fewer --workers, it goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    become_worker(0)
    _function = function


def _apply(group: list[Any]) -> list[Any]:
    assert _function is not None
    return [_function(item) for item in group]
