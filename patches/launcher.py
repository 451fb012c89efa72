"""CrypTen's launcher loses results, hangs on large ones and hides failures."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from crypten_espn.launch import run_multiprocess

from .patch import Patch, replace, together


def _probe() -> bool:
    from crypten.mpc import context

    # The mark of the defect: processes are joined before their results are read.
    source = inspect.getsource(context.run_multiprocess)
    join, get = source.find("process.join()"), source.find("queue.get()")
    return 0 <= join < get


def _install() -> Callable[[], None]:
    import crypten
    from crypten.mpc import context

    return together(
        replace(context, "run_multiprocess", run_multiprocess),
        replace(crypten.mpc, "run_multiprocess", run_multiprocess),
    )


PATCH = Patch(
    name="launcher",
    broke="crypten.mpc.run_multiprocess: joins parties before it reads their results, "
    "so tensors are lost and 200 kB hang; forks after OpenMP; returns None on failure",
    seen_on="torch 2.13.0 with crypten 0.4.1",
    delete_when="CrypTen reads results before it joins, starts parties without fork "
    "and raises when one fails",
    probe=_probe,
    install=_install,
)
