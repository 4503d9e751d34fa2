"""Playing a trace of requests against the policies of a store: what it would hit, write and give up."""
