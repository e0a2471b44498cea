WITH recover_claimed AS MATERIALIZED
(SELECT found.id AS id
FROM (SELECT locked.id AS id
FROM (SELECT served.id AS id
FROM (SELECT checkpoints.subscriptions.id AS id
FROM checkpoints.subscriptions JOIN checkpoints.subscription_groups ON checkpoints.subscription_groups.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscription_groups.name = %(recover_group_name)s::VARCHAR) AS served JOIN LATERAL (SELECT checkpoints.checkpoints_reserved.reserved_until AS due_at
FROM checkpoints.checkpoints_reserved
WHERE (checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until) >= (served.id, '-infinity'::timestamptz) AND (checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until) <= (served.id, statement_timestamp()) ORDER BY checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until
 LIMIT 1) AS oldest ON true ORDER BY oldest.due_at) AS waiting JOIN LATERAL (SELECT checkpoints.checkpoints_reserved.id AS id
FROM checkpoints.checkpoints_reserved
WHERE (checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until) >= (waiting.id, '-infinity'::timestamptz) AND (checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until) <= (waiting.id, statement_timestamp()) ORDER BY checkpoints.checkpoints_reserved.subscription_id, checkpoints.checkpoints_reserved.reserved_until
 LIMIT %(recover_limit)s::INTEGER + 1000000) AS due ON true JOIN LATERAL (SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.id = due.id AND checkpoints.checkpoints.subscription_id = waiting.id AND checkpoints.checkpoints.reserved_until <= statement_timestamp() FOR NO KEY UPDATE OF checkpoints SKIP LOCKED) AS locked ON true) AS found
 LIMIT %(recover_limit)s::INTEGER),
recovered AS
(UPDATE checkpoints.checkpoints SET reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT recover_claimed.id
FROM recover_claimed))) RETURNING checkpoints.checkpoints.id)
 SELECT recovered.id
FROM recovered
