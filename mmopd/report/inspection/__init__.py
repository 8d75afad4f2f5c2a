"""`mmopd inspect`: rows of shards and recorded responses, chosen by filters, on the terminal, as a page, or as JSON."""
