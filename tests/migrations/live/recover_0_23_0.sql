WITH recover_claimed AS MATERIALIZED
(SELECT locked.id AS id
FROM (SELECT checkpoints.checkpoints_reserved.id AS id, checkpoints.checkpoints_reserved.reserved_until AS reserved_until
FROM checkpoints.checkpoints_reserved
WHERE checkpoints.checkpoints_reserved.reserved_until <= statement_timestamp() ORDER BY checkpoints.checkpoints_reserved.reserved_until) AS due JOIN LATERAL (SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints JOIN checkpoints.subscriptions ON checkpoints.subscriptions.id = checkpoints.checkpoints.subscription_id JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.checkpoints.id = due.id AND checkpoints.subscription_groups.name = %(recover_group_name)s::VARCHAR AND checkpoints.checkpoints.reserved_until <= statement_timestamp() FOR NO KEY UPDATE OF checkpoints SKIP LOCKED) AS locked ON true
 LIMIT %(recover_limit)s::INTEGER),
recovered AS
(UPDATE checkpoints.checkpoints SET reserved_until=NULL WHERE checkpoints.checkpoints.id = ANY (array((SELECT recover_claimed.id
FROM recover_claimed))) RETURNING checkpoints.checkpoints.id)
 SELECT recovered.id
FROM recovered
