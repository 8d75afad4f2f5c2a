"""Which teachers score a prompt, what they are shown of it, and their scores."""
