-- As an application of revision 0.22.0 reserves: what is due, by a scan and a sort of the main table.
WITH claimed AS MATERIALIZED (
  SELECT c.id
  FROM checkpoints.checkpoints AS c
  JOIN checkpoints.subscriptions AS s ON s.id = c.subscription_id
  JOIN checkpoints.subscription_groups AS g ON g.id = s.subscription_group_id
  WHERE g.name = %(reserve_group_name)s::text
    AND s.status = ANY (%(reserve_subscription_statuses)s::checkpoints.subscription_status[])
    AND c.process_at <= statement_timestamp()
    AND c.reserved_until IS NULL
  ORDER BY c.process_at
  LIMIT %(reserve_limit)s::integer
  FOR UPDATE OF c SKIP LOCKED
)
UPDATE checkpoints.checkpoints AS c
SET reserved_until = statement_timestamp() + %(reserve_timeout)s::interval
WHERE c.id = ANY (ARRAY(SELECT claimed.id FROM claimed))
RETURNING c.id, c.subscription_id, c.stream_name, c.stream_position, c.stream_version,
  c.retry_attempts, c.status, c.reserved_until, c.process_at
