"""What a store decides about its blocks: which segment is freed, what is copied forward, what is taken in."""
