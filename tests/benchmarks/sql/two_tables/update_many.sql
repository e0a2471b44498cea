WITH ended AS (
  DELETE FROM two_tables.reserved
  WHERE id = ANY (%(update_ids)s::bigint[])
  RETURNING id
)
INSERT INTO two_tables.ready (id, process_at)
SELECT id, statement_timestamp() FROM ended
RETURNING id
