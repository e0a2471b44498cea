-- Many positions in one statement, where the toolkit has none for it yet.
UPDATE checkpoints.checkpoints AS c
SET stream_position = greatest(c.stream_position, given.stream_position),
  status = 'active',
  retry_attempts = 0,
  retries = NULL,
  process_at = statement_timestamp(),
  reserved_until = NULL
FROM unnest(
  %(update_ids)s::bigint[],
  %(update_reserved_untils)s::timestamptz[],
  %(update_stream_positions)s::bigint[]
) AS given(id, reserved_until, stream_position)
WHERE c.id = given.id AND c.reserved_until = given.reserved_until
RETURNING c.id
