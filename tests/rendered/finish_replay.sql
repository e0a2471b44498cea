WITH reached AS MATERIALIZED
(SELECT replay.id AS id
FROM checkpoints.subscriptions AS replay
WHERE replay.id = %(finish_subscription_id)s::BIGINT AND replay.status = 'replay' AND (SELECT checkpoints.checkpoints.id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(finish_subscription_id)s::BIGINT AND checkpoints.checkpoints.process_at IS NOT NULL AND checkpoints.checkpoints.reserved_until IS NULL ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.process_at
 LIMIT 1) IS NULL AND (SELECT checkpoints.checkpoints.id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(finish_subscription_id)s::BIGINT AND checkpoints.checkpoints.reserved_until IS NOT NULL AND (checkpoints.checkpoints.status != 'active' OR checkpoints.checkpoints.stream_version > checkpoints.checkpoints.stream_position) ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.reserved_until
 LIMIT 1) IS NULL AND replay.xmin = (SELECT seen.xmin
FROM checkpoints.subscriptions AS seen
WHERE seen.id = %(finish_subscription_id)s::BIGINT) FOR NO KEY UPDATE OF replay),
finished AS
(UPDATE checkpoints.subscriptions SET status='active', replay_target_position=NULL WHERE checkpoints.subscriptions.id = (SELECT reached.id
FROM reached) RETURNING checkpoints.subscriptions.id)
 SELECT finished.id
FROM finished
