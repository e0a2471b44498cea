WITH reached AS MATERIALIZED
(SELECT replay.id AS id
FROM checkpoints.subscriptions AS replay
WHERE replay.id = %(finish_subscription_id)s::BIGINT AND replay.status = 'replay' AND (SELECT checkpoints.checkpoints_ready.id
FROM checkpoints.checkpoints_ready
WHERE (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) >= (%(finish_subscription_id)s::BIGINT, '-infinity'::timestamptz) AND (checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at) <= (%(finish_subscription_id)s::BIGINT, 'infinity'::timestamptz) ORDER BY checkpoints.checkpoints_ready.subscription_id, checkpoints.checkpoints_ready.process_at
 LIMIT 1) IS NULL AND (SELECT checkpoints.checkpoints_reserved.id
FROM checkpoints.checkpoints_reserved JOIN checkpoints.checkpoints ON checkpoints.checkpoints.id = checkpoints.checkpoints_reserved.id
WHERE (checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until) >= (%(finish_subscription_id)s::BIGINT, '-infinity'::timestamptz) AND (checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until) <= (%(finish_subscription_id)s::BIGINT, 'infinity'::timestamptz) AND (checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) ORDER BY checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until
 LIMIT 1) IS NULL AND replay.xmin = (SELECT seen.xmin
FROM checkpoints.subscriptions AS seen
WHERE seen.id = %(finish_subscription_id)s::BIGINT) FOR NO KEY UPDATE OF replay),
finished AS
(UPDATE checkpoints.subscriptions SET status='active', replay_target_position=NULL WHERE checkpoints.subscriptions.id = (SELECT reached.id
FROM reached) RETURNING checkpoints.subscriptions.id)
 SELECT finished.id
FROM finished
