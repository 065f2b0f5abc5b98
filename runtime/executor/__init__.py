"""Executors run steps of an engine; one file a backend, one interface (`base`)."""
