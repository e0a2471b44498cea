-- What still lags is due again at once. That is said here, not left to the trigger, which would
-- notify at each cycle and so serialise the commits.
UPDATE checkpoints.checkpoints
SET stream_position = greatest(stream_position, %(update_stream_position)s::bigint),
  status = 'active',
  retry_attempts = 0,
  retries = NULL,
  process_at = CASE
    WHEN stream_version > greatest(stream_position, %(update_stream_position)s::bigint)
    THEN statement_timestamp()
  END,
  reserved_until = NULL
WHERE id = %(update_id)s::bigint
  AND reserved_until = %(update_reserved_until)s::timestamptz
RETURNING id, stream_version, stream_position
