"""A recorder without the runtime: follows the store in global order until SIGTERM or Ctrl-C.

It keeps its own position as a checkpoint of a subscription that no consumer is given. Start two,
and the second takes over when the first ends.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import ledger
from sqlalchemy import Connection, Engine, create_engine, update

from checkpoints import CheckpointRecord, Checkpoints
from checkpoints.tables import checkpoints

GLOBAL = "$global"
POLL_SECONDS = 0.2


def run(engine: Engine, stopping: threading.Event) -> None:
    """Record batch after batch; asleep when there is nothing new."""
    with engine.begin() as connection:
        commands = Checkpoints(connection)
        recorder = commands.add_or_update_subscription("recorders", "ledger")
        followers = [commands.add_or_update_subscription(ledger.GROUP, ledger.SUBSCRIPTION).id]
        commands.ensure_checkpoint_exists(recorder.id, GLOBAL)
    while not stopping.is_set():
        with engine.begin() as connection:
            recorded = record_batch(connection, recorder.id, followers)
        if not recorded:
            stopping.wait(POLL_SECONDS)


def record_batch(connection: Connection, recorder_id: int, followers: list[int]) -> int:
    """Record what is new and move the own position: one transaction."""
    # Another recorder waits here until this transaction ends.
    own = Checkpoints(connection).lock_checkpoint(recorder_id, GLOBAL)
    if own is None:
        raise LookupError(f"the recorder {recorder_id!r} has no checkpoint {GLOBAL!r}")
    received = ledger.read_all(connection, after=own.stream_position)
    if not received:
        return 0
    Checkpoints(connection).record_checkpoints(
        CheckpointRecord(follower, message.stream_name, message.version)
        for message in received
        for follower in followers
    )
    last = received[-1].global_position
    connection.execute(
        update(checkpoints)
        .where(checkpoints.c.id == own.id)
        .values(stream_version=last, stream_position=last)
    )
    return len(received)


def main() -> None:
    """Run until told to stop."""
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    engine = create_engine(os.environ["DATABASE_URL"])
    run(engine, stopping)
    engine.dispose()


if __name__ == "__main__":
    main()
