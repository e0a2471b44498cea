WITH skippable AS MATERIALIZED
(SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.id = ANY (%(skip_ids)s::BIGINT[]) AND (checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position OR checkpoints.checkpoints.reserved_until IS NOT NULL OR checkpoints.checkpoints.status != 'active') ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name FOR NO KEY UPDATE OF checkpoints),
skipped AS
(UPDATE checkpoints.checkpoints SET stream_position=greatest(checkpoints.checkpoints.stream_position, least(checkpoints.checkpoints.stream_position + 1, checkpoints.checkpoints.stream_version)), status='active', retry_attempts=0, retries=NULL, process_at=NULL, reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT skippable.id
FROM skippable))) RETURNING checkpoints.checkpoints.id)
 SELECT skipped.id
FROM skipped
