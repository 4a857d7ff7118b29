"""How the cells of an experiment are measured: one file a kind, each with a `Measure`."""
