"""Who waits for a number is woken by it, and leaves nothing behind."""

from __future__ import annotations

import asyncio

from headwater.server.waiters import Waiters


def test_who_waits_is_woken_by_its_number_or_a_higher_one_and_nobody_else() -> None:
    async def woken() -> list[set[int]]:
        waiters = Waiters()
        tasks = {n: asyncio.create_task(waiters.wait(n, 20)) for n in (1, 2, 3, 4)}
        found = []
        await asyncio.sleep(0)
        for number in (0, 1, 3, None):
            waiters.wake(number)
            for _ in range(3):  # turns of the loop: for the waiter, for `asyncio.wait`, to return
                await asyncio.sleep(0)
            found.append({n for n, task in tasks.items() if task.done()})
        await asyncio.gather(*tasks.values())
        return found

    assert asyncio.run(woken()) == [set(), {1}, {1, 2, 3}, {1, 2, 3, 4}]


def test_who_waits_no_longer_is_forgotten_though_nobody_is_woken() -> None:
    async def left_behind() -> int:
        waiters = Waiters()
        await waiters.wait(1, 0.001)
        gone = asyncio.create_task(waiters.wait(1, 20))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait({gone})
        return len(waiters._waiting)

    assert asyncio.run(left_behind()) == 0
