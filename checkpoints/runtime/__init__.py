"""The loops over the statements: consumers and recorders that survive what may happen to them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from checkpoints.runtime._recording import Interest, Start
from checkpoints.runtime.consumer import Consumer, Handler
from checkpoints.runtime.reading import (
    BEGINNING,
    XID8,
    ForeignTransactionIds,
    Message,
    MessageTable,
    Position,
)
from checkpoints.runtime.recorder import Recorder
from checkpoints.runtime.retry import RetryPolicy
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction
from checkpoints.runtime.telemetry import observe_lag

if TYPE_CHECKING:
    from checkpoints.runtime.async_consumer import AsyncConsumer, AsyncHandler
    from checkpoints.runtime.async_recorder import AsyncRecorder

__all__ = [
    "BEGINNING",
    "XID8",
    "AsyncConsumer",
    "AsyncHandler",
    "AsyncRecorder",
    "Consumer",
    "ConsumerSettings",
    "ForeignTransactionIds",
    "Handler",
    "Interest",
    "Message",
    "MessageTable",
    "OutsideTransaction",
    "Position",
    "Recorder",
    "RetryPolicy",
    "Start",
    "observe_lag",
]

_OF_ASYNCIO = {
    "AsyncConsumer": "checkpoints.runtime.async_consumer",
    "AsyncHandler": "checkpoints.runtime.async_consumer",
    "AsyncRecorder": "checkpoints.runtime.async_recorder",
}


def __getattr__(name: str) -> Any:
    """Import what needs greenlet, of the extra `asyncio`, when it is asked for."""
    if name in _OF_ASYNCIO:
        return getattr(import_module(_OF_ASYNCIO[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
