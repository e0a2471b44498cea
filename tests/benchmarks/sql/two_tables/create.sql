CREATE SCHEMA two_tables;
CREATE TABLE two_tables.ready (id bigint PRIMARY KEY, process_at timestamptz NOT NULL);
CREATE INDEX ON two_tables.ready (process_at);
CREATE TABLE two_tables.reserved (id bigint PRIMARY KEY, reserved_until timestamptz NOT NULL);
CREATE INDEX ON two_tables.reserved (reserved_until);
