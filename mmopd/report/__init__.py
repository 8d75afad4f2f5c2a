"""Files that show how a run went: metrics, samples, the HTML report and the model card."""
