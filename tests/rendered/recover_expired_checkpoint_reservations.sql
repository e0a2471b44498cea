WITH recover_served AS NOT MATERIALIZED
(SELECT sub.id AS id
FROM checkpoints.subscriptions AS sub JOIN checkpoints.subscription_groups AS owner ON owner.id = sub.subscription_group_id
WHERE owner.name = %(recover_group_name)s::VARCHAR),
recover_claimed AS MATERIALIZED
(SELECT found.id AS id
FROM (SELECT locked.id AS id
FROM (SELECT recover_served.id AS id
FROM recover_served JOIN LATERAL (SELECT hot.reserved_until AS due_at
FROM checkpoints.checkpoints_reserved AS hot
WHERE (hot.subscription_id, hot.reserved_until) >= (recover_served.id, '-infinity'::timestamptz) AND (hot.subscription_id, hot.reserved_until) <= (recover_served.id, statement_timestamp()) ORDER BY hot.subscription_id, hot.reserved_until
 LIMIT 1) AS oldest ON true ORDER BY oldest.due_at) AS waiting JOIN LATERAL (SELECT hot.id AS id
FROM checkpoints.checkpoints_reserved AS hot
WHERE (hot.subscription_id, hot.reserved_until) >= (waiting.id, '-infinity'::timestamptz) AND (hot.subscription_id, hot.reserved_until) <= (waiting.id, statement_timestamp()) ORDER BY hot.subscription_id, hot.reserved_until
 LIMIT (SELECT %(recover_limit)s::INTEGER + 1000000 AS anon_1)) AS due ON true JOIN LATERAL (SELECT main.id AS id
FROM checkpoints.checkpoints AS main
WHERE main.id = due.id AND main.subscription_id = waiting.id AND main.reserved_until <= statement_timestamp() FOR NO KEY UPDATE OF main SKIP LOCKED) AS locked ON true) AS found
 LIMIT (SELECT %(recover_limit)s::INTEGER AS anon_2)),
recovered AS
(UPDATE checkpoints.checkpoints SET reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT recover_claimed.id
FROM recover_claimed))) RETURNING checkpoints.checkpoints.id)
 SELECT recovered.id
FROM recovered
