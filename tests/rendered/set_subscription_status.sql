WITH changed AS
(UPDATE checkpoints.subscriptions SET status=%(set_status_status)s WHERE checkpoints.subscriptions.id = %(set_status_id)s::BIGINT RETURNING checkpoints.subscriptions.id, checkpoints.subscriptions.status)
 SELECT changed.id, changed.status
FROM changed
