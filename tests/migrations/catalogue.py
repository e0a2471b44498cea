"""All that is in a schema, as text: two schemas with the same text are the same."""

from __future__ import annotations

from sqlalchemy import Connection, text

_FINGERPRINT = text(r"""
WITH relations AS (
  SELECT oid, relname, relkind FROM pg_class
  WHERE relnamespace = to_regnamespace(quote_ident(:schema)) AND relname NOT LIKE 'alembic_version%'
)
SELECT concat_ws(' ', 'relation', relname, relkind, relpersistence, relrowsecurity, reloptions,
                 quote_literal(obj_description(oid, 'pg_class')))
FROM relations JOIN pg_class USING (oid, relname, relkind)
UNION ALL
SELECT concat_ws(' ', 'column', relname,
                 row_number() OVER (PARTITION BY attrelid ORDER BY attnum), attname,
                 format_type(atttypid, atttypmod),
                 'not null', attnotnull, 'identity', attidentity::text,
                 'generated', attgenerated::text,
                 'default', pg_get_expr(adbin, adrelid), 'collation', attcollation::regcollation,
                 'comment', quote_literal(col_description(attrelid, attnum)))
FROM relations
JOIN pg_attribute ON attrelid = relations.oid AND attnum > 0 AND NOT attisdropped
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE relkind = 'r'
UNION ALL
SELECT concat_ws(' ', 'sequence', relname, seqtypid::regtype, seqstart, seqincrement, seqmin,
                 seqmax, seqcache, seqcycle)
FROM relations JOIN pg_sequence ON seqrelid = oid
UNION ALL
SELECT concat_ws(' ', 'constraint', relname, conname, pg_get_constraintdef(pg_constraint.oid, true),
                 convalidated)
FROM relations JOIN pg_constraint ON conrelid = relations.oid
UNION ALL
SELECT concat_ws(' ', 'index', relname, pg_get_indexdef(indexrelid, 0, true), indisvalid,
                 indisclustered)
FROM relations JOIN pg_index ON indrelid = relations.oid
UNION ALL
SELECT concat_ws(' ', 'trigger', relname, tgenabled, pg_get_triggerdef(pg_trigger.oid, true))
FROM relations JOIN pg_trigger ON tgrelid = relations.oid AND NOT tgisinternal
UNION ALL
SELECT concat_ws(' ', 'function', proname, pg_get_function_arguments(pg_proc.oid),
                 prorettype::regtype, lanname, provolatile, prosecdef, proisstrict, proconfig,
                 replace(prosrc, ' ' || quote_ident(:schema) || '.', ' <schema>.'))
FROM pg_proc JOIN pg_language ON pg_language.oid = prolang
WHERE pronamespace = to_regnamespace(quote_ident(:schema))
UNION ALL
SELECT concat_ws(' ', 'enum', typname,
                 (SELECT string_agg(enumlabel, ', ' ORDER BY enumsortorder)
                  FROM pg_enum WHERE enumtypid = pg_type.oid))
FROM pg_type WHERE typnamespace = to_regnamespace(quote_ident(:schema)) AND typtype = 'e'
""")


def fingerprint(connection: Connection, schema: str = "checkpoints") -> list[str]:
    """What is in a schema but the version table, each thing a text that does not name the schema.

    It ends the connection's transaction.
    """
    connection.rollback()
    # What is in the search path is named without its schema.
    connection.execute(
        text("SELECT set_config('search_path', quote_ident(:schema), true)"), {"schema": schema}
    )
    found = sorted(connection.scalars(_FINGERPRINT, {"schema": schema}))
    connection.rollback()
    return found
