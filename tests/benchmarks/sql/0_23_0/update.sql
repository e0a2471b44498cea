WITH updated AS
(UPDATE checkpoints.checkpoints SET stream_position=greatest(checkpoints.checkpoints.stream_position, %(update_stream_position)s::BIGINT), status='active', retry_attempts=0, retries=NULL, process_at=coalesce(%(update_process_at)s::TIMESTAMP WITH TIME ZONE, statement_timestamp() + %(update_process_in)s::INTERVAL), reserved_until=NULL WHERE checkpoints.checkpoints.id = %(update_id)s::BIGINT AND checkpoints.checkpoints.reserved_until = %(update_reserved_until)s::TIMESTAMP WITH TIME ZONE RETURNING checkpoints.checkpoints.id, checkpoints.checkpoints.stream_version, checkpoints.checkpoints.stream_position)
 SELECT updated.id, updated.stream_version, updated.stream_position
FROM updated
