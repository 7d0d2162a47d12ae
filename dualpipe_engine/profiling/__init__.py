"""What a profile is, how it is read and what it says. Works without torch."""
