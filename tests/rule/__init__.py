"""The rule between the main table and the hot tables, whatever is written."""
