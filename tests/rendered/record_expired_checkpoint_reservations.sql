WITH record_expired_served AS NOT MATERIALIZED
(SELECT sub.id AS id
FROM checkpoints.subscriptions AS sub JOIN checkpoints.subscription_groups AS owner ON owner.id = sub.subscription_group_id
WHERE owner.name = %(record_expired_group_name)s::VARCHAR),
record_expired_claimed AS MATERIALIZED
(SELECT found.id AS id
FROM (SELECT locked.id AS id
FROM (SELECT record_expired_served.id AS id
FROM record_expired_served JOIN LATERAL (SELECT hot.reserved_until AS due_at
FROM checkpoints.checkpoints_reserved AS hot
WHERE (hot.subscription_id, hot.reserved_until) >= (record_expired_served.id, '-infinity'::timestamptz) AND (hot.subscription_id, hot.reserved_until) <= (record_expired_served.id, statement_timestamp()) ORDER BY hot.subscription_id, hot.reserved_until
 LIMIT 1) AS oldest ON true ORDER BY oldest.due_at) AS waiting JOIN LATERAL (SELECT hot.id AS id
FROM checkpoints.checkpoints_reserved AS hot
WHERE (hot.subscription_id, hot.reserved_until) >= (waiting.id, '-infinity'::timestamptz) AND (hot.subscription_id, hot.reserved_until) <= (waiting.id, statement_timestamp()) ORDER BY hot.subscription_id, hot.reserved_until
 LIMIT (SELECT %(record_expired_limit)s::INTEGER + 1000000 AS anon_1)) AS due ON true JOIN LATERAL (SELECT main.id AS id
FROM checkpoints.checkpoints AS main
WHERE main.id = due.id AND main.subscription_id = waiting.id AND main.reserved_until <= statement_timestamp() FOR NO KEY UPDATE OF main SKIP LOCKED) AS locked ON true) AS found
 LIMIT (SELECT %(record_expired_limit)s::INTEGER AS anon_2)),
expired_recorded AS
(UPDATE checkpoints.checkpoints SET status=CASE WHEN ((checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) AND checkpoints.checkpoints.retry_attempts + 1 >= %(record_expired_max_attempts)s::INTEGER) THEN 'failed' WHEN (checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) THEN 'retry' ELSE checkpoints.checkpoints.status END, retry_attempts=CASE WHEN (checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) THEN checkpoints.checkpoints.retry_attempts + 1 ELSE checkpoints.checkpoints.retry_attempts END, retries=CASE WHEN (checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) THEN coalesce(checkpoints.checkpoints.retries, jsonb_build_array()) || jsonb_build_array(jsonb_build_object('attempt', checkpoints.checkpoints.retry_attempts + 1, 'stream_position', checkpoints.checkpoints.stream_position, 'recorded_at', statement_timestamp(), 'error', jsonb_build_object('type', 'ReservationExpired', 'message', concat('the reservation until ', checkpoints.checkpoints.reserved_until, ' expired: the consumer was gone or stuck')))) ELSE checkpoints.checkpoints.retries END, process_at=CASE WHEN ((checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) AND checkpoints.checkpoints.retry_attempts + 1 >= %(record_expired_max_attempts)s::INTEGER) THEN NULL WHEN (checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) THEN statement_timestamp() + least(%(record_expired_process_in)s::INTERVAL * power(2, least(checkpoints.checkpoints.retry_attempts, 12)) * (0.5 + random()), interval '1 hour') ELSE checkpoints.checkpoints.process_at END, reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT record_expired_claimed.id
FROM record_expired_claimed))) RETURNING checkpoints.checkpoints.id, checkpoints.checkpoints.status, checkpoints.checkpoints.retry_attempts)
 SELECT expired_recorded.id, expired_recorded.status, expired_recorded.retry_attempts
FROM expired_recorded
