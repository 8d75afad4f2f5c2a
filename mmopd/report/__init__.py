"""What a run leaves to look at: metrics, samples, and one HTML page."""
