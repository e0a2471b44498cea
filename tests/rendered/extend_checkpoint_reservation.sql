WITH extended AS
(UPDATE checkpoints.checkpoints SET reserved_until=(statement_timestamp() + %(extend_timeout)s::INTERVAL), updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = %(extend_id)s::BIGINT AND checkpoints.checkpoints.reserved_until = %(extend_reserved_until)s::TIMESTAMP WITH TIME ZONE RETURNING checkpoints.checkpoints.id, checkpoints.checkpoints.reserved_until)
 SELECT extended.id, extended.reserved_until
FROM extended
