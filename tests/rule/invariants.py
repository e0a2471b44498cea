"""The rule once more, as plain SQL that shares nothing with `audit_checkpoints`."""

from __future__ import annotations

from sqlalchemy import Connection

# Whole tables are compared with what they should be, so that a hot row of no checkpoint is found
# too.
BROKEN = """
WITH ready AS (
  SELECT id, subscription_id, process_at FROM checkpoints.checkpoints_ready
), reserved AS (
  SELECT id, subscription_id, reserved_until FROM checkpoints.checkpoints_reserved
), claimable AS (
  SELECT id, subscription_id, process_at FROM checkpoints.checkpoints
  WHERE process_at IS NOT NULL AND reserved_until IS NULL
), claimed AS (
  SELECT id, subscription_id, reserved_until FROM checkpoints.checkpoints
  WHERE reserved_until IS NOT NULL
)
SELECT 'ready, and should not be', id FROM (TABLE ready EXCEPT TABLE claimable) AS wrong
UNION ALL
SELECT 'not ready, and should be', id FROM (TABLE claimable EXCEPT TABLE ready) AS wrong
UNION ALL
SELECT 'reserved, and should not be', id FROM (TABLE reserved EXCEPT TABLE claimed) AS wrong
UNION ALL
SELECT 'not reserved, and should be', id FROM (TABLE claimed EXCEPT TABLE reserved) AS wrong
UNION ALL
SELECT 'ready and reserved', id FROM ready JOIN reserved USING (id)
UNION ALL
SELECT 'forgotten', id FROM checkpoints.checkpoints
WHERE process_at IS NULL
  AND (status = 'retry' OR status = 'active' AND stream_version > stream_position)
UNION ALL
SELECT 'nothing to do, and a time for it', id FROM checkpoints.checkpoints
WHERE process_at IS NOT NULL AND reserved_until IS NULL
  AND status = 'active' AND stream_version <= stream_position
UNION ALL
SELECT 'lags, and is in neither hot table', id FROM checkpoints.checkpoints AS main
WHERE stream_version > stream_position AND status = 'active'
  AND NOT EXISTS (SELECT FROM ready WHERE ready.id = main.id)
  AND NOT EXISTS (SELECT FROM reserved WHERE reserved.id = main.id)
"""


def broken(connection: Connection) -> list[tuple[str, int]]:
    """What breaks the rule, and the id of the checkpoint; nothing, if all is well."""
    return [(row[0], row[1]) for row in connection.exec_driver_sql(BROKEN)]
