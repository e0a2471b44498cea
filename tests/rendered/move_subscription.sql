WITH move_found_group AS
(SELECT checkpoints.subscription_groups.id AS id
FROM checkpoints.subscription_groups
WHERE checkpoints.subscription_groups.name = %(move_group_name)s::VARCHAR),
move_added_group AS
(INSERT INTO checkpoints.subscription_groups (name) SELECT %(move_group_name)s::VARCHAR AS anon_1
WHERE NOT (EXISTS (SELECT move_found_group.id
FROM move_found_group)) AND (EXISTS (SELECT *
FROM checkpoints.subscriptions
WHERE checkpoints.subscriptions.id = %(move_id)s::BIGINT)) ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING checkpoints.subscription_groups.id),
move_group AS
(SELECT move_found_group.id AS id
FROM move_found_group UNION ALL SELECT move_added_group.id AS id
FROM move_added_group),
moved AS
(UPDATE checkpoints.subscriptions SET subscription_group_id=(SELECT move_group.id
FROM move_group) WHERE checkpoints.subscriptions.id = %(move_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.subscription_group_id)
 SELECT moved.id, moved.subscription_group_id
FROM moved
