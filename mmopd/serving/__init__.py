"""vLLM servers and the HTTP protocol that they are asked by, for teachers and student alike."""
