WITH released AS
(UPDATE checkpoints.checkpoints SET reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = %(release_id)s::BIGINT AND checkpoints.checkpoints.reserved_until = %(release_reserved_until)s::TIMESTAMP WITH TIME ZONE RETURNING checkpoints.checkpoints.id)
 SELECT released.id
FROM released
