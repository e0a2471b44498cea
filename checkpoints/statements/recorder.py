"""The recorder's statements: what there is to process.

They lock main rows in the order (subscription_id, stream_name) and wait for locks, so that
recorders with overlapping batches wait for each other and never deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from sqlalchemy import BigInteger, Select, Text, column, func, select
from sqlalchemy.dialects.postgresql import insert

from checkpoints import _arguments as arguments
from checkpoints.records import CheckpointRecord
from checkpoints.statements import _template as template
from checkpoints.tables import checkpoints, checkpoints_ready

__all__ = ["advance_lagging_subscription_checkpoints", "record_checkpoints"]


def record_checkpoints(records: Iterable[CheckpointRecord]) -> Select[int, int, str, int, int]:
    """Add checkpoints, or raise the `stream_version` of those that exist.

    A version only rises. Records of one checkpoint collapse: the highest version, and for a new
    one the lowest position. Any number of records has one SQL text. A checkpoint that now lags
    becomes ready, unless it is reserved (then when that ends), waits for a retry (its backoff
    stands) or has failed.

    Rows: id, subscription_id, stream_name, stream_version, stream_position of each that is new or
    rose; the others give none. Locks the rows of all records, in the common order, and waits.

    Raises:
        TypeError, ValueError: a record is not a `CheckpointRecord`.
        sqlalchemy.exc.IntegrityError: on execution, for an unknown subscription; nothing is
            recorded. The executing layer raises `UnknownSubscription`.
    """
    given = arguments.instances("records", records, CheckpointRecord)
    return template.bind(
        _record(),
        record_subscription_ids=[record.subscription_id for record in given],
        record_stream_names=[record.stream_name for record in given],
        record_stream_versions=[record.stream_version for record in given],
        record_stream_positions=[record.stream_position for record in given],
    )


@cache
def _record() -> Select[int, int, str, int, int]:
    given = (
        func.unnest(
            template.bigints("record_subscription_ids"),
            template.strings("record_stream_names"),
            template.bigints("record_stream_versions"),
            template.bigints("record_stream_positions"),
        )
        .table_valued(
            column("subscription_id", BigInteger),
            column("stream_name", Text),
            column("stream_version", BigInteger),
            column("stream_position", BigInteger),
        )
        .render_derived(name="given")
    )
    key = (given.c.subscription_id, given.c.stream_name)
    merged = (
        select(*key, func.max(given.c.stream_version), func.min(given.c.stream_position))
        .group_by(*key)
        .order_by(*key)
    )
    insertion = insert(checkpoints).from_select(
        ["subscription_id", "stream_name", "stream_version", "stream_position"], merged
    )
    recorded = (
        insertion.on_conflict_do_update(
            index_elements=[checkpoints.c.subscription_id, checkpoints.c.stream_name],
            set_={
                "stream_version": insertion.excluded.stream_version,
                # Spares a call of the trigger that would, for each row.
                "updated_at": template.statement_time(),
            },
            where=checkpoints.c.stream_version < insertion.excluded.stream_version,
        )
        .returning(
            checkpoints.c.id,
            checkpoints.c.subscription_id,
            checkpoints.c.stream_name,
            checkpoints.c.stream_version,
            checkpoints.c.stream_position,
        )
        .cte("recorded")
    )
    return select(
        recorded.c.id,
        recorded.c.subscription_id,
        recorded.c.stream_name,
        recorded.c.stream_version,
        recorded.c.stream_position,
    )


def advance_lagging_subscription_checkpoints(
    subscription_id: int, *, limit: int = 500
) -> Select[int]:
    """Move lagging checkpoints of a subscription to their version: start from now.

    Position := version, status active, attempts and errors cleared. Reserved ones are left alone.
    At most `limit` a call, whichever they are: call again, each in a transaction of its own, until
    no row comes back.

    Rows: id of each that was moved. Locks them in the common order and waits.
    """
    return template.bind(
        _advance(),
        advance_subscription_id=arguments.identifier("subscription_id", subscription_id),
        advance_limit=arguments.limit("limit", limit),
    )


@cache
def _advance() -> Select[int]:
    id = template.bigint("advance_subscription_id")
    limit = template.integer("advance_limit")
    lags = (
        checkpoints.c.stream_version > checkpoints.c.stream_position,
        checkpoints.c.reserved_until.is_(None),
    )
    # Nearly all of them are ready; one that has failed is not, unless it was scheduled. Found where
    # they are few, and never among all that the subscription follows.
    ready = (
        template.oldest_of_subscription(checkpoints_ready.c.process_at, id)
        .join(checkpoints, checkpoints.c.id == checkpoints_ready.c.id)
        .where(*lags)
        .limit(limit)
        .subquery("ready")
    )
    failed = (
        select(checkpoints.c.id)
        .where(
            checkpoints.c.subscription_id == id,
            checkpoints.c.status == template.FAILED,
            checkpoints.c.process_at.is_(None),
            *lags,
        )
        .limit(limit)
        .subquery("failed")
    )
    candidates = template.materialized(
        select(ready.c.id).union_all(select(failed.c.id)), "advance_candidates"
    )
    lagging = template.materialized(
        select(checkpoints.c.id)
        .where(template.is_one_of(candidates), *lags)
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .limit(limit)
        .with_for_update(of=checkpoints, key_share=True),
        "lagging",
    )
    advanced = (
        template.update_checkpoints()
        .where(template.is_one_of(lagging))
        .values(stream_position=checkpoints.c.stream_version, **template.succeeded())
        .returning(checkpoints.c.id)
        .cte("advanced")
    )
    return select(advanced.c.id)
