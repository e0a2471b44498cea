WITH changed AS
(UPDATE checkpoints.subscriptions SET status=CAST(%(set_status_status)s AS checkpoints.subscription_status), replay_target_position=CASE WHEN (CAST(%(set_status_status)s AS checkpoints.subscription_status) = 'active') THEN NULL ELSE checkpoints.subscriptions.replay_target_position END WHERE checkpoints.subscriptions.id = %(set_status_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.status)
 SELECT changed.id, changed.status
FROM changed
