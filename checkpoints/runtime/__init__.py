"""The loops over the statements: consumers and recorders that survive what may happen to them."""

from checkpoints.runtime.async_consumer import AsyncConsumer, AsyncHandler
from checkpoints.runtime.consumer import Consumer, Handler
from checkpoints.runtime.retry import RetryPolicy
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction

__all__ = [
    "AsyncConsumer",
    "AsyncHandler",
    "Consumer",
    "ConsumerSettings",
    "Handler",
    "OutsideTransaction",
    "RetryPolicy",
]
