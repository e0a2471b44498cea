WITH renamed AS
(UPDATE checkpoints.subscriptions SET name=%(rename_name)s::VARCHAR WHERE checkpoints.subscriptions.id = %(rename_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.name)
 SELECT renamed.id, renamed.name
FROM renamed
