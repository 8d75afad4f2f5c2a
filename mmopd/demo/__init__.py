"""The demo world: data and tiny models that are made locally."""
