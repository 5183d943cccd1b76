"""Real models to test and measure with: small ones that ship (`fashion`), larger ones to fetch (`zoo`)."""
