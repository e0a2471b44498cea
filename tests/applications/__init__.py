"""The toolkit within applications: frameworks, pools, drivers, schemas, keys that refer to it."""
