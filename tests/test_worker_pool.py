"""The pool of threads: as many as there is work for, and every call finds one."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest

from kvlode import StoreClosed
from kvlode.gds.threads import WorkerPool


def threads_of(name: str) -> int:
    return sum(thread.name.startswith(name + "-") for thread in threading.enumerate())


def test_threads_are_started_when_there_is_work_for_them() -> None:
    pool = WorkerPool("test-few", 8)
    for _ in range(50):
        pool.submit(int).result(30.0)
    assert threads_of("test-few") <= 3  # one ahead, and a thread that has just told its result may not wait again yet
    assert pool.shutdown(30.0)


def test_calls_that_wait_for_each_other_get_a_thread_each() -> None:
    pool, count = WorkerPool("test-many", 8), 8
    for _ in range(50):
        barrier = threading.Barrier(count)
        done, late = wait([pool.submit(barrier.wait, 30.0) for _ in range(count)], 30.0)
        assert not late
        assert sorted(future.result() for future in done) == list(range(count))
    assert threads_of("test-many") == count
    assert pool.shutdown(30.0)


def test_calls_from_many_threads_find_every_thread_of_the_pool() -> None:
    pool = WorkerPool("test-crowd", 4)
    for _ in range(20):
        barrier = threading.Barrier(4)
        futures = []
        callers = [threading.Thread(target=lambda: futures.append(pool.submit(barrier.wait, 30.0))) for _ in range(4)]  # noqa: B023
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wait(futures, 30.0).not_done
    assert pool.shutdown(30.0)


def test_a_pool_that_can_start_no_more_threads_does_all_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool("test-refused", 4)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    futures = [pool.submit(int) for _ in range(20)]
    assert not wait(futures, 30.0).not_done
    assert threads_of("test-refused") == 1
    assert pool.shutdown(30.0)


def test_nothing_is_taken_after_shutdown_and_what_was_taken_is_done() -> None:
    pool, done = WorkerPool("test-shut", 3), []
    for number in range(30):
        pool.run(done.append, number)
    assert pool.shutdown(30.0)
    assert sorted(done) == list(range(30))
    assert threads_of("test-shut") == 0
    with pytest.raises(StoreClosed):
        pool.submit(int)
