WITH advance_candidates AS MATERIALIZED
(SELECT ready.id AS id
FROM (SELECT checkpoints.checkpoints_ready.id AS id
FROM checkpoints.checkpoints_ready JOIN checkpoints.checkpoints ON checkpoints.checkpoints.id = checkpoints.checkpoints_ready.id
WHERE (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) >= (%(advance_subscription_id)s::BIGINT, '-infinity'::timestamptz) AND (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) <= (%(advance_subscription_id)s::BIGINT, 'infinity'::timestamptz) AND checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position AND checkpoints.checkpoints.reserved_until IS NULL ORDER BY checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at
 LIMIT %(advance_limit)s::INTEGER) AS ready UNION ALL SELECT failed.id AS id
FROM (SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(advance_subscription_id)s::BIGINT AND checkpoints.checkpoints.status = 'failed' AND checkpoints.checkpoints.process_at IS NULL AND checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position AND checkpoints.checkpoints.reserved_until IS NULL
 LIMIT %(advance_limit)s::INTEGER) AS failed),
lagging AS MATERIALIZED
(SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.id = ANY (array((SELECT advance_candidates.id
FROM advance_candidates))) AND checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position AND checkpoints.checkpoints.reserved_until IS NULL ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name
 LIMIT %(advance_limit)s::INTEGER FOR NO KEY UPDATE OF checkpoints),
advanced AS
(UPDATE checkpoints.checkpoints SET stream_position=checkpoints.checkpoints.stream_version, status='active', retry_attempts=0, retries=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT lagging.id
FROM lagging))) RETURNING checkpoints.checkpoints.id)
 SELECT advanced.id
FROM advanced
