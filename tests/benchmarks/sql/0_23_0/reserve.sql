WITH reserve_claimed AS MATERIALIZED
(SELECT locked.id AS id
FROM (SELECT checkpoints.checkpoints_ready.id AS id, checkpoints.checkpoints_ready.process_at AS process_at
FROM checkpoints.checkpoints_ready
WHERE checkpoints.checkpoints_ready.process_at <= statement_timestamp() ORDER BY checkpoints.checkpoints_ready.process_at) AS due JOIN LATERAL (SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints JOIN checkpoints.subscriptions ON checkpoints.subscriptions.id = checkpoints.checkpoints.subscription_id JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.checkpoints.id = due.id AND checkpoints.subscription_groups.name = %(reserve_group_name)s::VARCHAR AND checkpoints.checkpoints.process_at <= statement_timestamp() AND checkpoints.checkpoints.reserved_until IS NULL AND checkpoints.subscriptions.status = ANY (%(reserve_subscription_statuses)s::checkpoints.subscription_status[]) AND (%(reserve_subscription_names)s::TEXT[] IS NULL OR checkpoints.subscriptions.name = ANY (%(reserve_subscription_names)s::TEXT[])) FOR NO KEY UPDATE OF checkpoints SKIP LOCKED) AS locked ON true
 LIMIT %(reserve_limit)s::INTEGER),
reserved AS
(UPDATE checkpoints.checkpoints SET reserved_until=(statement_timestamp() + %(reserve_timeout)s::INTERVAL) WHERE checkpoints.checkpoints.id = ANY (array((SELECT reserve_claimed.id
FROM reserve_claimed))) RETURNING checkpoints.checkpoints.id, checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name, checkpoints.checkpoints.stream_position, checkpoints.checkpoints.stream_version, checkpoints.checkpoints.retry_attempts, checkpoints.checkpoints.status, checkpoints.checkpoints.process_at, checkpoints.checkpoints.reserved_until)
 SELECT reserved.id, reserved.subscription_id, checkpoints.subscriptions.name AS subscription_name, reserved.stream_name, reserved.stream_position, reserved.stream_version, reserved.retry_attempts, reserved.status, checkpoints.subscriptions.replay_target_position, reserved.reserved_until, reserved.process_at
FROM reserved JOIN checkpoints.subscriptions ON checkpoints.subscriptions.id = reserved.subscription_id ORDER BY reserved.process_at, reserved.id
