"""vLLM servers for the teachers and the student, and the HTTP protocol of their clients."""
