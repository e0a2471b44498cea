WITH resumed AS
(UPDATE checkpoints.subscriptions SET status=CASE WHEN (checkpoints.subscriptions.status = 'paused' AND checkpoints.subscriptions.replay_target_position IS NOT NULL) THEN 'replay' WHEN (checkpoints.subscriptions.status = 'paused') THEN 'active' ELSE checkpoints.subscriptions.status END WHERE checkpoints.subscriptions.id = %(resume_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.status)
 SELECT resumed.id, resumed.status
FROM resumed
