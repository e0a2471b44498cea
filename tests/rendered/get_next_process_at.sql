SELECT oldest.id, oldest.process_at, oldest.process_at - statement_timestamp() AS due_in
FROM checkpoints.subscriptions JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id JOIN LATERAL (SELECT checkpoints.checkpoints_ready.id AS id, checkpoints.checkpoints_ready.process_at AS process_at
FROM checkpoints.checkpoints_ready
WHERE (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) >= (checkpoints.subscriptions.id, coalesce(%(next_due_since)s::TIMESTAMP WITH TIME ZONE, '-infinity'::timestamptz)) AND (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) <= (checkpoints.subscriptions.id, 'infinity'::timestamptz) ORDER BY checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at
 LIMIT 1) AS oldest ON true
WHERE checkpoints.subscription_groups.name = %(next_group_name)s::VARCHAR AND checkpoints.subscriptions.status IN ('active', 'replay') ORDER BY oldest.process_at
 LIMIT 1
