WITH schedulable AS MATERIALIZED
(SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.id = ANY (%(schedule_ids)s::BIGINT[]) AND checkpoints.checkpoints.reserved_until IS NULL AND (checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position OR checkpoints.checkpoints.status != 'active') ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name FOR NO KEY UPDATE OF checkpoints),
scheduled AS
(UPDATE checkpoints.checkpoints SET process_at=coalesce(%(schedule_process_at)s::TIMESTAMP WITH TIME ZONE, statement_timestamp() + %(schedule_process_in)s::INTERVAL), updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT schedulable.id
FROM schedulable))) RETURNING checkpoints.checkpoints.id)
 SELECT scheduled.id
FROM scheduled
