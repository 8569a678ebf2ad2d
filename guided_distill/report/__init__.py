"""What a run looks like: its page and its pictures."""
