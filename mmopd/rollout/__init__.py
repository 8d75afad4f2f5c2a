"""The student's side of a step: sample its engines, send them new weights."""
