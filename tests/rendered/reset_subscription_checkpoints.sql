WITH stopped AS MATERIALIZED
(SELECT checkpoints.subscriptions.id AS id, checkpoints.subscriptions.status AS status
FROM checkpoints.subscriptions
WHERE checkpoints.subscriptions.id = %(reset_subscription_id)s::BIGINT FOR SHARE OF subscriptions),
resettable AS MATERIALIZED
(SELECT checkpoints.checkpoints.id AS id
FROM checkpoints.checkpoints
WHERE checkpoints.checkpoints.subscription_id = (SELECT stopped.id
FROM stopped
WHERE (stopped.status NOT IN ('active', 'replay'))) AND checkpoints.checkpoints.stream_name > %(reset_after)s::VARCHAR AND (checkpoints.checkpoints.stream_position > %(reset_stream_position)s::BIGINT OR checkpoints.checkpoints.reserved_until IS NOT NULL OR checkpoints.checkpoints.status != 'active') ORDER BY checkpoints.checkpoints.subscription_id, checkpoints.checkpoints.stream_name
 LIMIT %(reset_limit)s::INTEGER FOR NO KEY UPDATE OF checkpoints),
taken_back AS
(UPDATE checkpoints.checkpoints SET stream_position=least(checkpoints.checkpoints.stream_position, %(reset_stream_position)s::BIGINT), status='active', retry_attempts=0, retries=NULL, process_at=NULL, reserved_until=NULL, updated_at=statement_timestamp() WHERE checkpoints.checkpoints.id = ANY (array((SELECT resettable.id
FROM resettable))) RETURNING checkpoints.checkpoints.stream_name)
 SELECT stopped.id, stopped.status, array((SELECT taken_back.stream_name
FROM taken_back ORDER BY taken_back.stream_name)) AS stream_names
FROM stopped
