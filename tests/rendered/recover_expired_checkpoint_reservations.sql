WITH expired AS MATERIALIZED
(SELECT checkpoints.checkpoints_reserved.id AS id
FROM checkpoints.checkpoints_reserved JOIN checkpoints.checkpoints ON checkpoints.checkpoints.id = checkpoints.checkpoints_reserved.id JOIN checkpoints.subscriptions ON checkpoints.subscriptions.id = checkpoints.checkpoints.subscription_id JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscription_groups.name = %(recover_group_name)s::VARCHAR AND checkpoints.checkpoints_reserved.reserved_until <= statement_timestamp() AND checkpoints.checkpoints.reserved_until <= statement_timestamp() ORDER BY checkpoints.checkpoints_reserved.reserved_until
 LIMIT %(recover_limit)s::INTEGER FOR NO KEY UPDATE OF checkpoints_reserved, checkpoints SKIP LOCKED),
recovered AS
(UPDATE checkpoints.checkpoints SET reserved_until=NULL WHERE checkpoints.checkpoints.id = ANY (array((SELECT expired.id
FROM expired))) RETURNING checkpoints.checkpoints.id)
 SELECT recovered.id
FROM recovered
