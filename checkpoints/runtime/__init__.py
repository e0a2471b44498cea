"""The loops over the statements: consumers and recorders that survive what may happen to them."""

from checkpoints.runtime._recording import Interest, Start
from checkpoints.runtime.async_consumer import AsyncConsumer, AsyncHandler
from checkpoints.runtime.async_recorder import AsyncRecorder
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
