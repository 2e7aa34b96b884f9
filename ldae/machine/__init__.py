"""The machine that ldae runs on: its parts, its rates, and the time that a run takes on it."""
