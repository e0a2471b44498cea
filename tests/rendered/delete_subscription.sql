WITH unneeded AS MATERIALIZED
(SELECT checkpoints.subscriptions.id AS id
FROM checkpoints.subscriptions
WHERE checkpoints.subscriptions.id = %(delete_id)s::BIGINT FOR UPDATE OF subscriptions),
deleted_subscription AS
(DELETE FROM checkpoints.subscriptions WHERE checkpoints.subscriptions.id = (SELECT unneeded.id
FROM unneeded) AND (SELECT checkpoints.checkpoints.id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(delete_id)s::BIGINT ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name
 LIMIT 1) IS NULL RETURNING checkpoints.subscriptions.id)
 SELECT unneeded.id, EXISTS (SELECT deleted_subscription.id
FROM deleted_subscription) AS deleted
FROM unneeded
