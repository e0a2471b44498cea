SELECT checkpoints.checkpoints.id, checkpoints.checkpoints.stream_version, checkpoints.checkpoints.stream_position, checkpoints.checkpoints.status, checkpoints.checkpoints.reserved_until
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = %(lock_subscription_id)s::BIGINT AND checkpoints.checkpoints.stream_name = %(lock_stream_name)s::VARCHAR FOR NO KEY UPDATE OF checkpoints
