SELECT checkpoints.subscriptions.id, checkpoints.subscriptions.status, checkpoints.subscriptions.subscription_group_id, checkpoints.subscriptions.replay_target_position
FROM checkpoints.subscriptions JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscription_groups.name = %(get_subscription_group_name)s::VARCHAR AND checkpoints.subscriptions.name = %(get_subscription_name)s::VARCHAR
