WITH ended AS (
  DELETE FROM two_tables.reserved
  WHERE id = %(update_id)s::bigint AND reserved_until = %(update_reserved_until)s::timestamptz
  RETURNING id
)
INSERT INTO two_tables.ready (id, process_at)
SELECT id, statement_timestamp() FROM ended
RETURNING id
