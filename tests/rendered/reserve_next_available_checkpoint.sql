WITH reserve_served AS NOT MATERIALIZED
(SELECT sub.id AS id
FROM checkpoints.subscriptions AS sub JOIN checkpoints.subscription_groups AS owner ON owner.id = sub.subscription_group_id
WHERE owner.name = %(reserve_group_name)s::VARCHAR AND sub.status IN ('active', 'replay')),
reserve_asked AS MATERIALIZED
(SELECT count(*) > 16 AS has_many, coalesce(%(reserve_due_since)s::TIMESTAMP WITH TIME ZONE, '-infinity'::timestamptz) AS since
FROM (SELECT reserve_served.id AS id
FROM reserve_served
 LIMIT 17) AS counted),
reserve_head AS MATERIALIZED
(SELECT hot.id AS id, hot.subscription_id AS subscription_id
FROM checkpoints.checkpoints_ready AS hot
WHERE (SELECT reserve_asked.has_many
FROM reserve_asked) AND (hot.process_at, 0) >= ((SELECT reserve_asked.since
FROM reserve_asked), 0) AND (hot.process_at, 0) <= (statement_timestamp(), 0) ORDER BY hot.process_at
 LIMIT (SELECT 32 + 2 * %(reserve_limit)s::INTEGER AS anon_1)),
reserve_claimed AS MATERIALIZED
(SELECT found.id AS id
FROM (SELECT locked.id AS id
FROM reserve_head JOIN LATERAL (SELECT reserve_served.id AS id
FROM reserve_served
WHERE reserve_served.id = reserve_head.subscription_id
 LIMIT ALL OFFSET 0) AS own ON true JOIN LATERAL (SELECT main.id AS id
FROM checkpoints.checkpoints AS main
WHERE main.id = reserve_head.id AND main.subscription_id = reserve_head.subscription_id AND main.process_at <= statement_timestamp() AND main.reserved_until IS NULL FOR NO KEY UPDATE OF main SKIP LOCKED) AS locked ON true UNION ALL SELECT locked.id AS id
FROM (SELECT reserve_served.id AS id
FROM reserve_served JOIN LATERAL (SELECT hot.process_at AS due_at
FROM checkpoints.checkpoints_ready AS hot
WHERE (hot.subscription_id, hot.process_at) >= (reserve_served.id, (SELECT reserve_asked.since
FROM reserve_asked)) AND (hot.subscription_id, hot.process_at) <= (reserve_served.id, statement_timestamp()) ORDER BY hot.subscription_id, hot.process_at
 LIMIT 1) AS oldest ON true ORDER BY oldest.due_at) AS waiting JOIN LATERAL (SELECT hot.id AS id
FROM checkpoints.checkpoints_ready AS hot
WHERE (hot.subscription_id, hot.process_at) >= (waiting.id, (SELECT reserve_asked.since
FROM reserve_asked)) AND (hot.subscription_id, hot.process_at) <= (waiting.id, statement_timestamp()) AND hot.id != ALL (array((SELECT reserve_head.id
FROM reserve_head))) ORDER BY hot.subscription_id, hot.process_at
 LIMIT (SELECT %(reserve_limit)s::INTEGER + 1000000 AS anon_2)) AS due ON true JOIN LATERAL (SELECT main.id AS id
FROM checkpoints.checkpoints AS main
WHERE main.id = due.id AND main.subscription_id = waiting.id AND main.process_at <= statement_timestamp() AND main.reserved_until IS NULL FOR NO KEY UPDATE OF main SKIP LOCKED) AS locked ON true
WHERE NOT (SELECT reserve_asked.has_many
FROM reserve_asked) OR (SELECT count(*) = 32 + 2 * %(reserve_limit)s::INTEGER AS anon_3
FROM reserve_head)) AS found
 LIMIT (SELECT %(reserve_limit)s::INTEGER AS anon_4)),
reserved AS
(UPDATE checkpoints.checkpoints AS main SET reserved_until=(statement_timestamp() + %(reserve_timeout)s::INTERVAL), updated_at=statement_timestamp() WHERE main.id = ANY (array((SELECT reserve_claimed.id
FROM reserve_claimed))) RETURNING main.id, main.subscription_id, main.stream_name, main.stream_position, main.stream_version, main.retry_attempts, main.status, main.process_at, main.reserved_until)
 SELECT reserved.id, reserved.subscription_id, sub.name AS subscription_name, reserved.stream_name, reserved.stream_position, reserved.stream_version, reserved.retry_attempts, reserved.status, sub.replay_target_position, reserved.reserved_until, reserved.process_at
FROM reserved JOIN checkpoints.subscriptions AS sub ON sub.id = reserved.subscription_id ORDER BY reserved.process_at, reserved.id
