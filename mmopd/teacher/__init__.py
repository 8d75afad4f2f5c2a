"""Teachers: route prompts to them, show them a view of each prompt, and collect their scores."""
