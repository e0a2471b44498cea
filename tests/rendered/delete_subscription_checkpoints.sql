WITH closed AS MATERIALIZED
(SELECT checkpoints.subscriptions.id AS id
FROM checkpoints.subscriptions
WHERE checkpoints.subscriptions.id = %(delete_checkpoints_subscription_id)s::BIGINT FOR UPDATE OF subscriptions),
deletable AS MATERIALIZED
(SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = (SELECT closed.id
FROM closed) ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name
 LIMIT %(delete_checkpoints_limit)s::INTEGER FOR UPDATE OF checkpoints SKIP LOCKED),
deleted_checkpoints AS
(DELETE FROM checkpoints.checkpoints WHERE checkpoints.checkpoints.id = ANY (array((SELECT deletable.id
FROM deletable))) RETURNING checkpoints.checkpoints.id)
 SELECT deleted_checkpoints.id
FROM deleted_checkpoints
