WITH existing AS
(SELECT checkpoints.checkpoints.id AS id, checkpoints.checkpoints.stream_version AS stream_version, checkpoints.checkpoints.stream_position AS stream_position
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(ensure_subscription_id)s::BIGINT AND checkpoints.checkpoints.stream_name = %(ensure_stream_name)s::VARCHAR),
ensured AS
(INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version, stream_position) SELECT %(ensure_subscription_id)s::BIGINT AS anon_1, %(ensure_stream_name)s::VARCHAR AS anon_2, %(ensure_stream_version)s::BIGINT AS anon_3, %(ensure_stream_position)s::BIGINT AS anon_4
WHERE NOT (EXISTS (SELECT existing.id
FROM existing)) ON CONFLICT (subscription_id, stream_name) DO UPDATE SET stream_name = excluded.stream_name RETURNING checkpoints.checkpoints.id, checkpoints.checkpoints.stream_version, checkpoints.checkpoints.stream_position)
 SELECT either.id, either.stream_version, either.stream_position
FROM (SELECT existing.id AS id, existing.stream_version AS stream_version, existing.stream_position AS stream_position
FROM existing UNION ALL SELECT ensured.id AS id, ensured.stream_version AS stream_version, ensured.stream_position AS stream_position
FROM ensured) AS either
