WITH lagging AS MATERIALIZED
(SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(advance_subscription_id)s::BIGINT AND checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position AND checkpoints.checkpoints.reserved_until IS NULL ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name
 LIMIT %(advance_limit)s::INTEGER FOR NO KEY UPDATE OF checkpoints),
advanced AS
(UPDATE checkpoints.checkpoints SET stream_position=checkpoints.checkpoints.stream_version, status='active', retry_attempts=0, retries=NULL WHERE checkpoints.checkpoints.id = ANY (array((SELECT lagging.id
FROM lagging))) RETURNING checkpoints.checkpoints.id)
 SELECT advanced.id
FROM advanced
