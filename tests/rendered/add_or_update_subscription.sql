WITH found_group AS
(SELECT checkpoints.subscription_groups.id AS id
FROM checkpoints.subscription_groups
WHERE checkpoints.subscription_groups.name = %(add_group_name)s::VARCHAR),
found AS
(SELECT checkpoints.subscriptions.id AS id, checkpoints.subscriptions.status AS status, checkpoints.subscriptions.subscription_group_id AS subscription_group_id, checkpoints.subscriptions.replay_target_position AS replay_target_position
FROM checkpoints.subscriptions JOIN found_group ON found_group.id = checkpoints.subscriptions.subscription_group_id
WHERE checkpoints.subscriptions.name = %(add_name)s::VARCHAR),
added_group AS
(INSERT INTO checkpoints.subscription_groups (name) SELECT %(add_group_name)s::VARCHAR AS anon_2
WHERE NOT (EXISTS (SELECT found_group.id
FROM found_group)) ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING checkpoints.subscription_groups.id),
the_group AS
(SELECT found_group.id AS id
FROM found_group UNION ALL SELECT added_group.id AS id
FROM added_group),
added AS
(INSERT INTO checkpoints.subscriptions (subscription_group_id, name) SELECT the_group.id AS id, %(add_name)s::VARCHAR AS anon_1
FROM the_group
WHERE NOT (EXISTS (SELECT found.id
FROM found)) ON CONFLICT (subscription_group_id, name) DO UPDATE SET name = excluded.name RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.status, checkpoints.subscriptions.subscription_group_id, checkpoints.subscriptions.replay_target_position)
 SELECT either.id, either.status, either.subscription_group_id, either.replay_target_position
FROM (SELECT found.id AS id, found.status AS status, found.subscription_group_id AS subscription_group_id, found.replay_target_position AS replay_target_position
FROM found UNION ALL SELECT added.id AS id, added.status AS status, added.subscription_group_id AS subscription_group_id, added.replay_target_position AS replay_target_position
FROM added) AS either
