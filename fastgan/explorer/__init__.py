"""The local page of `fastgan explore`: what it shows, and which requests it answers."""
