WITH paused AS
(UPDATE checkpoints.subscriptions SET status=CASE WHEN (checkpoints.subscriptions.status IN ('active', 'replay')) THEN 'paused' ELSE checkpoints.subscriptions.status END WHERE checkpoints.subscriptions.id = %(pause_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.status)
 SELECT paused.id, paused.status
FROM paused
