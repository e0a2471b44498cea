WITH reserve_size AS MATERIALIZED
(SELECT count(*) > 16 AS has_many
FROM (SELECT checkpoints.subscriptions.id AS id
FROM checkpoints.subscriptions JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscription_groups.name = %(reserve_group_name)s::VARCHAR AND checkpoints.subscriptions.status = ANY (%(reserve_subscription_statuses)s::checkpoints.subscription_status[]) AND (%(reserve_subscription_names)s::TEXT[] IS NULL OR checkpoints.subscriptions.name = ANY (%(reserve_subscription_names)s::TEXT[]))
 LIMIT 17) AS counted),
reserve_head AS MATERIALIZED
(SELECT checkpoints.checkpoints_ready.id AS id, checkpoints.checkpoints_ready.subscription_id AS subscription_id
FROM checkpoints.checkpoints_ready
WHERE (SELECT reserve_size.has_many
FROM reserve_size) AND checkpoints.checkpoints_ready.process_at >= coalesce(%(reserve_due_since)s::TIMESTAMP WITH TIME ZONE, '-infinity'::timestamptz) AND checkpoints.checkpoints_ready.process_at <= statement_timestamp() ORDER BY checkpoints.checkpoints_ready.process_at
 LIMIT 32 + 2 * %(reserve_limit)s::INTEGER),
reserve_claimed AS MATERIALIZED
(SELECT found.id AS id
FROM (SELECT locked.id AS id
FROM reserve_head JOIN LATERAL (SELECT checkpoints.subscriptions.id AS id
FROM checkpoints.subscriptions JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscription_groups.name = %(reserve_group_name)s::VARCHAR AND checkpoints.subscriptions.status = ANY (%(reserve_subscription_statuses)s::checkpoints.subscription_status[]) AND (%(reserve_subscription_names)s::TEXT[] IS NULL OR checkpoints.subscriptions.name = ANY (%(reserve_subscription_names)s::TEXT[])) AND checkpoints.subscriptions.id = reserve_head.subscription_id
 LIMIT ALL OFFSET 0) AS own ON true JOIN LATERAL (SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.id = reserve_head.id AND checkpoints.checkpoints.subscription_id = reserve_head.subscription_id AND checkpoints.checkpoints.process_at <= statement_timestamp() AND checkpoints.checkpoints.reserved_until IS NULL FOR NO KEY UPDATE OF checkpoints SKIP LOCKED) AS locked ON true UNION ALL SELECT locked.id AS id
FROM (SELECT served.id AS id
FROM (SELECT checkpoints.subscriptions.id AS id
FROM checkpoints.subscriptions JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscription_groups.name = %(reserve_group_name)s::VARCHAR AND checkpoints.subscriptions.status = ANY (%(reserve_subscription_statuses)s::checkpoints.subscription_status[]) AND (%(reserve_subscription_names)s::TEXT[] IS NULL OR checkpoints.subscriptions.name = ANY (%(reserve_subscription_names)s::TEXT[]))) AS served JOIN LATERAL (SELECT checkpoints.checkpoints_ready.process_at AS due_at
FROM checkpoints.checkpoints_ready
WHERE (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) >= (served.id, coalesce(%(reserve_due_since)s::TIMESTAMP WITH TIME ZONE, '-infinity'::timestamptz)) AND (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) <= (served.id, statement_timestamp()) ORDER BY checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at
 LIMIT 1) AS oldest ON true ORDER BY oldest.due_at) AS waiting JOIN LATERAL (SELECT checkpoints.checkpoints_ready.id AS id
FROM checkpoints.checkpoints_ready
WHERE (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) >= (waiting.id, coalesce(%(reserve_due_since)s::TIMESTAMP WITH TIME ZONE, '-infinity'::timestamptz)) AND (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) <= (waiting.id, statement_timestamp()) ORDER BY checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at
 LIMIT %(reserve_limit)s::INTEGER + 1000000) AS due ON true JOIN LATERAL (SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.id = due.id AND checkpoints.checkpoints.subscription_id = waiting.id AND checkpoints.checkpoints.process_at <= statement_timestamp() AND checkpoints.checkpoints.reserved_until IS NULL FOR NO KEY UPDATE OF checkpoints SKIP LOCKED) AS locked ON true
WHERE NOT (SELECT reserve_size.has_many
FROM reserve_size) OR (SELECT count(*) = 32 + 2 * %(reserve_limit)s::INTEGER AS anon_1
FROM reserve_head)) AS found
 LIMIT %(reserve_limit)s::INTEGER),
reserved AS
(UPDATE checkpoints.checkpoints SET reserved_until=(statement_timestamp() + %(reserve_timeout)s::INTERVAL), updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT reserve_claimed.id
FROM reserve_claimed))) RETURNING checkpoints.checkpoints.id, checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name, checkpoints.checkpoints.stream_position, checkpoints.checkpoints.stream_version, checkpoints.checkpoints.retry_attempts, checkpoints.checkpoints.status, checkpoints.checkpoints.process_at, checkpoints.checkpoints.reserved_until)
 SELECT reserved.id, reserved.subscription_id, checkpoints.subscriptions.name AS subscription_name, reserved.stream_name, reserved.stream_position, reserved.stream_version, reserved.retry_attempts, reserved.status, checkpoints.subscriptions.replay_target_position, reserved.reserved_until, reserved.process_at
FROM reserved JOIN checkpoints.subscriptions ON checkpoints.subscriptions.id = reserved.subscription_id ORDER BY reserved.process_at, reserved.id
