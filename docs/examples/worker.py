"""A worker: a recorder and a consumer of the runtime, until SIGTERM or Ctrl-C. Start any number."""

from __future__ import annotations

import logging
import os
import threading

import ledger
from sqlalchemy import Connection, Text, create_engine, literal_column

from checkpoints import Reservation
from checkpoints.runtime import Consumer, Interest, MessageTable, Recorder

# Appending transactions of this store wait for each other, so the global position is enough.
in_order = MessageTable(
    global_position=ledger.messages.c.global_position,
    transaction_id=None,
    stream_name=ledger.messages.c.stream_name,
    stream_position=ledger.messages.c.version,
    type=literal_column("'Booked'", Text()),
)


def apply(connection: Connection, reservation: Reservation) -> int | None:
    """Apply what is new in a stream; the position of the last message applied."""
    received = ledger.read(connection, reservation.stream_name, reservation.stream_position)
    if not received:
        return None
    ledger.apply(connection, reservation.stream_name, received)
    return received[-1].version


def record(recorder: Recorder, consumer: Consumer) -> None:
    """Record until stopped; an error of the recorder's ends the worker."""
    try:
        recorder.run()
    finally:
        consumer.stop()


def main() -> None:
    """Run until told to stop."""
    logging.basicConfig(level=logging.INFO)
    engine = create_engine(os.environ["DATABASE_URL"])
    recorder = Recorder(engine, ledger.GROUP, in_order, [Interest(ledger.SUBSCRIPTION)])
    consumer = Consumer(engine, ledger.GROUP, {ledger.SUBSCRIPTION: apply})
    recording = threading.Thread(target=record, args=(recorder, consumer))
    recording.start()
    try:
        consumer.run()
    finally:
        recorder.stop()
        recording.join()
        engine.dispose()


if __name__ == "__main__":
    main()
