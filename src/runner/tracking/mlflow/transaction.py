"""Many calls of MLflow's client in one transaction of its database.

MLflow commits each call, several times for some: 16 commits create a run, and each waits for the disk. MLflow has no
public way to join calls, so ``transaction`` replaces what its store (``SqlAlchemyStore``, the same in MLflow 2.22 to
3.17) makes its database sessions with.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextlib.contextmanager
def transaction(client: MlflowClient) -> Iterator[None]:
    """All calls of the client inside the ``with`` block, by this thread, are committed at its end, or none is.

    The client's store has to be a database of this process, not a server. Other processes read what was committed
    before; they cannot write from the first write inside the block to its end, so it should be short.

    Raises:
        Exception: the block has failed, or MLflow has undone one of its calls; nothing was written.
    """
    backend: Any = client._tracking_client.store
    make, owner = backend.ManagedSessionMaker, threading.get_ident()
    with make(**_for_writing(make)) as session:

        @contextlib.contextmanager
        def shared(*words: Any, **options: Any) -> Iterator[Any]:
            if threading.get_ident() != owner:
                with make(*words, **options) as own:
                    yield own
                return
            is_outermost = not calls
            calls.append(None)
            try:
                yield session
                session.flush()
                if is_outermost:  # the next call reads anew, as in a session of its own
                    session.expunge_all()
            finally:
                calls.pop()

        calls: list[None] = []
        with _replaced(backend, ManagedSessionMaker=shared), _replaced(session, commit=session.flush, rollback=_undone):
            yield


def _for_writing(make: Callable[..., Any]) -> dict[str, bool]:
    """MLflow 3.11 and later tells sessions that only read from the others."""
    return {"read_only": False} if "read_only" in inspect.signature(make).parameters else {}


def _undone() -> None:
    raise RuntimeError("MLflow undoes one of several calls that are one transaction")


@contextlib.contextmanager
def _replaced(what: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of the object, and restore them at the end; those of its class are uncovered again."""
    before = {name: vars(what)[name] for name in attributes if name in vars(what)}
    for name, value in attributes.items():
        setattr(what, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(what, name, before[name])
            else:
                delattr(what, name)
