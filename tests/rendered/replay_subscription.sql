WITH replaying AS
(UPDATE checkpoints.subscriptions SET status='replay', replay_target_position=%(replay_subscription_target)s::BIGINT WHERE checkpoints.subscriptions.id = %(replay_subscription_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.status, checkpoints.subscriptions.replay_target_position)
 SELECT replaying.id, replaying.status, replaying.replay_target_position
FROM replaying
