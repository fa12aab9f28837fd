"""The commands `s2uc` and `appctrl`, and what all our commands have in common."""
