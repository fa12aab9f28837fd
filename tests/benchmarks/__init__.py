"""`make bench`: our relays and their peers, interleaved in one run; what each costs, and what each delivers."""
