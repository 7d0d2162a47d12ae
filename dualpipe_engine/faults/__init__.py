"""What happens when a rank is lost: who notices, who is blamed, and how every wait ends.

Nothing here trains; the engine asks it before it steps and before it returns a loss.
"""
