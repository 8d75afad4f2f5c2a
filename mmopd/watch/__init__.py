"""The page of `mmopd watch`: runs in progress or finished, read from their folders while they grow."""
