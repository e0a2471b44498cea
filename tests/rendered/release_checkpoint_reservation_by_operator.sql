WITH released_any AS
(UPDATE checkpoints.checkpoints SET reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = %(release_any_id)s::BIGINT AND checkpoints.checkpoints.reserved_until IS NOT NULL RETURNING checkpoints.checkpoints.id)
 SELECT released_any.id
FROM released_any
