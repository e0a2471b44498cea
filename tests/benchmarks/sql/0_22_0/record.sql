INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version, stream_position)
SELECT subscription_id, stream_name, max(stream_version), min(stream_position)
FROM unnest(
  %(record_subscription_ids)s::bigint[],
  %(record_stream_names)s::text[],
  %(record_stream_versions)s::bigint[],
  %(record_stream_positions)s::bigint[]
) AS given(subscription_id, stream_name, stream_version, stream_position)
GROUP BY subscription_id, stream_name
ORDER BY subscription_id, stream_name
ON CONFLICT (subscription_id, stream_name) DO UPDATE
SET stream_version = excluded.stream_version
WHERE checkpoints.stream_version < excluded.stream_version
RETURNING id, subscription_id, stream_name, stream_version, stream_position
