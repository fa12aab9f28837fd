"""Services of others, as far as tests need them: real HTTP, spoken with by the real clients, and named stand-ins."""
