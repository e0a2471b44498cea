WITH taken AS (
  DELETE FROM two_tables.ready
  WHERE id = ANY (ARRAY(
    SELECT id FROM two_tables.ready
    ORDER BY process_at LIMIT %(reserve_limit)s::integer FOR UPDATE SKIP LOCKED
  ))
  RETURNING id
)
INSERT INTO two_tables.reserved (id, reserved_until)
SELECT id, statement_timestamp() + %(reserve_timeout)s::interval FROM taken
RETURNING id, reserved_until, 0 AS stream_position
